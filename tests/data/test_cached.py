"""What a cache says of itself."""

from data.cached import Difference, differences, part_names


def test_parts_are_named_after_their_shards() -> None:
    assert part_names(["/a/b/00000.tar", "/a/b/00007.tar"]) == ["00000", "00007"]
    assert part_names(["/a/b/0.tar", "/a/c/0.tar", "/a/c/d/0.tar"]) == ["b-0", "c-0", "c-d-0"]
    assert part_names(["x.tar"]) == ["x"]
    assert part_names(["s3://bucket/x/1.tar", "s3://bucket/y/1.tar"]) == ["x-1", "y-1"]


def test_a_name_stays_when_other_shards_go() -> None:
    paths = [f"/data/{i:05d}.tar" for i in range(5)]
    assert part_names(paths[3:]) == part_names(paths)[3:]


def test_names_that_clash_are_numbered() -> None:
    assert part_names(["a/x.tar", "a/x.tar"]) == ["00000", "00001"]
    assert part_names(["a-b/c.tar", "a/b-c.tar", "a/d.tar"]) == ["00000", "00001", "00002"]


def test_differences_are_named() -> None:
    one = {"crop": "center", "text": None, "views": {"tokens": {"reduce": 1}}}
    other = {"crop": "center", "text": {"name": "t5"}, "views": {"tokens": {"reduce": 2}}}
    assert differences(one, one) == []
    assert differences(one, other) == [
        Difference("views.tokens.reduce", 1, 2),
        Difference("text.name", None, "t5"),
    ]


def test_lists_of_mappings_are_looked_into() -> None:
    one, other = ({"sizes": [32, n], "features": [{"mode": n}]} for n in (8, 9))
    assert differences(one, other) == [
        Difference("sizes", [32, 8], [32, 9]),
        Difference("features.0.mode", 8, 9),
    ]
