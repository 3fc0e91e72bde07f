import torch

from fastadapt.kernels.common.side_stream import Branch
from tests.helpers.kernel_checks import gpu


def test_without_a_graph_a_product_is_there_at_once():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    branch = Branch(a.device)
    assert torch.equal(branch.mm(a, b), a @ b)
    branch.join()


@gpu
def test_gpu_a_graph_has_what_eager_calls_have():
    a = torch.randn(300, 200, device="cuda")
    b = torch.randn(200, 100, device="cuda")

    def run():
        branch = Branch(a.device)
        product = branch.mm(a * 2, b)
        beside = [(a * i).sum() for i in range(20)]  # would overwrite memory that is not held
        later = branch.mm(a + 1, b)
        branch.join()
        return product, later, *beside

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        a.normal_()
        b.normal_()
        graph.replay()
        for got, expected in zip(captured, run(), strict=True):
            torch.testing.assert_close(got, expected)
