def test_it_says_what_it_needs(command, tmp_path):
    args = ("search", tmp_path, "--out", tmp_path / "out")
    code, _, err = command(*args)
    assert code == 1 and err.count("\n") == 1 and "search needs --backbone NAME" in err
    code, _, err = command(*args, "--backbone", "test_vit", "--folds", 1)
    assert code == 1 and "--folds is 1; expected 2 to 100" in err
