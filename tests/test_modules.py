"""Python that users bring along is found from any folder."""

from jaxalign.modules import find_module


def test_a_file_of_a_package_imports_its_neighbours(tmp_path, monkeypatch):
    package = tmp_path / "here" / "my_study" / "part"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "shared.py").write_text("VALUE = 7\n")
    (package / "one.py").write_text("from my_study.part.shared import VALUE\n")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    monkeypatch.setattr("sys.path", ["/nowhere"])
    assert find_module(str(package / "one.py"), "experiment").VALUE == 7
