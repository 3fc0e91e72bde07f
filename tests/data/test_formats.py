from fastadapt.data.formats import EXTENSIONS, FORMATS, is_image_file


def test_image_files_by_name(tmp_path):
    names = ("a.png", "b.JPG", "c.tiff", ".hidden.png", "notes.txt")
    assert [is_image_file(tmp_path / n) for n in names] == [True, True, True, False, False]


def test_nothing_is_named_that_pillow_only_writes_or_hands_on():
    for suffix in (".pdf", ".eps", ".ps", ".h5", ".hdf", ".grib", ".mpg", ".emf", ".wmf", ".fits"):
        assert suffix not in EXTENSIONS
    assert {"PNG", "JPEG", "TIFF", "BMP"} <= set(FORMATS)
    assert "EPS" not in FORMATS
    assert {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".mpo"} <= EXTENSIONS
