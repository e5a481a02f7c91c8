import numpy as np
import pytest
from PIL import Image

from data.retrieval_set import read_retrieval_set

ROWS = "query_image,query_text,target_image\na.png,add cup,b.png\nb.png,remove cup,a.png\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for seed, name in enumerate(("a.png", "b.png", "c d.png")):
        pixels = np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / name)
    (tmp_path / "set.csv").write_text(ROWS)
    return tmp_path


def test_database_is_the_distinct_targets_in_order(folder):
    (folder / "set.csv").write_text(ROWS + "a.png,,b.png\nb.png,add x,c d.png\na.png,add cup,b.png\n")
    found = read_retrieval_set(folder)
    assert [p.rsplit("/", 1)[1] for p in found.database["target_image"]] == ["b.png", "a.png", "c d.png"]
    assert found.targets == [0, 1, 0, 2, 0]  # repeated rows all count, each distinct image stands once
    assert found.queries["query_text"].tolist()[2] == "" and found.problems == ()


def test_windows_line_ends_mark_and_spaces(folder):
    text = "\ufeffquery_image , query_text,target_image\na.png,\"add cup, please\",c d.png\n".replace("\n", "\r\n")
    (folder / "set.csv").write_bytes(text.encode())
    found = read_retrieval_set(folder)
    assert found.queries["query_text"].tolist() == ["add cup, please"]
    assert found.queries["target_image"].tolist() == [str(folder / "images" / "c d.png")]


def test_images_beside_the_table(folder):
    for image in list((folder / "images").iterdir()):
        image.rename(folder / image.name)
    (folder / "images").rmdir()
    assert read_retrieval_set(folder).queries["query_image"].tolist()[0] == str(folder / "a.png")


def test_bad_rows_are_named_and_the_others_stay(folder):
    whole = (folder / "images" / "a.png").read_bytes()
    (folder / "images" / "cut.png").write_bytes(whole[:1500])
    (folder / "set.csv").write_text(ROWS + "cut.png,t,a.png\na.png,t,none.png\n../a.png,t,a.png\n,t,a.png\n")
    found = read_retrieval_set(folder)
    assert len(found.queries) == 2
    (folder / "images" / "loop.png").symlink_to(folder / "images" / "loop.png")
    with (folder / "set.csv").open("a") as table:
        table.write(f"loop.png,t,a.png\n{'x' * 300}.png,t,a.png\n")
    assert len(read_retrieval_set(folder).problems) == len(found.problems) + 2
    lines = [str(problem) for problem in found.problems]
    assert "set.csv row 4 'query_image' 'cut.png': expected a readable image, found" in lines[0]
    assert "set.csv row 5 'target_image' 'none.png': expected a file in" in lines[1]
    assert "row 6 'query_image' '../a.png': expected a name inside" in lines[2]
    assert "row 7 'query_image' '': expected an image name, found an empty cell" in lines[3]


def test_what_cannot_be_scored_at_all(folder, refuses):
    with refuses(r"nowhere: expected a folder with one CSV file and images, found no such folder"):
        read_retrieval_set(folder / "nowhere")
    with refuses(r"images: expected one CSV file, found none"):
        read_retrieval_set(folder / "images")
    (folder / "set.csv").write_text("query_image,text,target_image\na.png,t,b.png\n")
    with refuses(r"set\.csv header: expected the columns query_image, .*, found query_image, text, target_image"):
        read_retrieval_set(folder)
    (folder / "set.csv").write_text(ROWS.splitlines()[0])
    with refuses(r"set\.csv: expected at least one row that can be scored, found no rows"):
        read_retrieval_set(folder)
    (folder / "set.csv").write_text("query_image,query_text,target_image\nx.png,t,b.png\n")
    with refuses(r"expected at least one row that can be scored, found .*row 2 'query_image' 'x.png'"):
        read_retrieval_set(folder)
    (folder / "set.csv").write_bytes(b"")
    with refuses(r"set\.csv: expected a CSV file in UTF-8, found No columns"):
        read_retrieval_set(folder)
    (folder / "set.csv").write_bytes(b"query_image,\xff\xfe\n")
    with refuses(r"set\.csv: expected a CSV file in UTF-8, found .*decode"):
        read_retrieval_set(folder)
    (folder / "set.csv").write_text(ROWS.splitlines()[0] + "\na.png,add cup, please,b.png\n")
    with refuses(r"set\.csv: expected 3 fields a row, as the header has, found more"):
        read_retrieval_set(folder)
    (folder / "set.csv").write_text("query_image, query_image,query_text,target_image\na.png,a.png,t,b.png\n")
    with refuses(r"set\.csv header: expected each column once, found query_image, query_image"):
        read_retrieval_set(folder)
    (folder / "set.csv").write_text(ROWS + "a,b,c,d,e\n")
    with refuses(r"set\.csv: expected a CSV file in UTF-8, found .*Expected 3 fields"):
        read_retrieval_set(folder)
    (folder / "two.csv").write_text(ROWS)
    with refuses(r"expected one CSV file, found set\.csv, two\.csv"):
        read_retrieval_set(folder)
