"""Serve a bundle over HTTP with FastAPI: an image in, its class and probabilities out.

    python examples/http_server.py bundle --port 8000
    curl --data-binary @a.png http://127.0.0.1:8000/predict

``pip install fastapi uvicorn`` first. One process loads the bundle once; its threads may call it at
the same time. For batches, models side by side and metrics there is NVIDIA Triton
(``fastadapt export --triton-repo``).
"""

import argparse
import tempfile

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool

import fastadapt as fa

LARGEST = 32 * 2**20  # bytes of an image file


def make_app(bundle: str, trust: bool = False) -> FastAPI:
    """Make the application of a bundle.

    Args:
        bundle: the folder.
        trust: run native code of a bundle that was not made on this machine.
    """
    predict = fa.export.load(bundle, trust=trust)
    app = FastAPI(title="fastadapt")

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"file": predict.artefact.path or "", "runtime": predict.runtime.name}

    @app.post("/predict")
    async def predict_image(request: Request) -> dict[str, object]:
        content = bytearray()
        async for chunk in request.stream():
            content += chunk
            if len(content) > LARGEST:
                raise HTTPException(413, f"the image has more than {LARGEST} bytes")
        try:
            return await run_in_threadpool(answer, bytes(content))
        except fa.InputError as error:
            raise HTTPException(422, str(error)) from None

    def answer(content: bytes) -> dict[str, object]:
        # A file is decoded as in training, by safe decoders alone, whatever somebody sent.
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            try:
                result = predict(file.name)
            except fa.InputError as error:
                raise fa.InputError(str(error).replace(file.name, "the image")) from None
        shares = zip(result.classes, result.probabilities[0].tolist(), strict=True)
        return {"prediction": result.labels[0], "probabilities": dict(shares)}

    return app


def main(arguments: list[str] | None = None) -> None:
    """Serve until the process is stopped."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--trust", action="store_true", help="run native code from elsewhere")
    options = parser.parse_args(arguments)

    import uvicorn

    uvicorn.run(make_app(options.bundle, options.trust), host=options.host, port=options.port)


if __name__ == "__main__":
    main()
