"""Build emoji.parquet from the npm package emoji-datasource-google: real, labelled, free images.

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz
    python examples/emoji/build.py package

The PNG bytes are Google's Noto renderings, untouched. The `image` column is the struct that
Hugging Face `datasets` writes for an Image feature, so this is also an example of such a file.
"""

import argparse
import hashlib
import io
import json
import re
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

LEFT_OUT = "Component"  # skin-tone swatches: five, all alike, no picture of anything
TEST_SHARE = 0.25  # of the hash range; at least 400 queries are wanted, so the share is checked
SIGNS = re.compile(r"-200d-(?:2640-fe0f|2642-fe0f|27a1-fe0f)")  # woman, man, facing right
PEOPLE = {  # a code point that says man or woman -> the one that does not
    "1f466": "1f9d2",  # boy
    "1f467": "1f9d2",  # girl
    "1f468": "1f9d1",  # man
    "1f469": "1f9d1",  # woman
    "1f474": "1f9d3",  # older man
    "1f475": "1f9d3",  # older woman
    "1f478": "1f934",  # princess, prince
    "1f930": "1fac4",  # pregnant woman
    "1fac3": "1fac4",  # pregnant man
    "1f57a": "1f483",  # man dancing, dancer
    "1f936": "1f385",  # Mother and Father Christmas
    "1f46c": "1f46b",  # two men, man and woman holding hands
    "1f46d": "1f46b",  # two women
}
FAMILY = re.compile(r"1f9d1(?:-200d-1f9d1)?(?:-200d-1f9d2)+")
SEQUENCES = {  # of people, by their code points -> the same drawing as one
    "1f9d1-200d-1f91d-200d-1f9d1": "1f46b",  # holding hands
    "1f9d1-200d-2764-fe0f-200d-1f48b-200d-1f9d1": "1f48f",  # kiss
    "1f9d1-200d-2764-fe0f-200d-1f9d1": "1f491",  # couple with heart
    "1f9d1-200d-1f37c": "1f931",  # feeding, breast-feeding
    "1f9d1-200d-1f384": "1f385",  # Christmas
    "1fac5": "1f934",  # person with crown
}
FEWEST_TEST = 400

SCHEMA = pa.schema(
    {
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "name": pa.string(),
        "category": pa.string(),
        "subcategory": pa.string(),
        "split": pa.string(),
    }
)
# What `datasets` writes beside the schema, so that load_dataset("parquet", ...) decodes the image.
FEATURES = {name: {"dtype": "string", "_type": "Value"} for name in SCHEMA.names[1:]}
HUGGINGFACE = json.dumps({"info": {"features": {"image": {"_type": "Image"}, **FEATURES}}})


def drawing(path: str) -> str:
    """Return what a file shows, whether man, woman or person, and whichever way they face.

    Drawings that differ in this alone are near-duplicates: a query whose twin is in the bank tells
    nothing of an encoder. What shows nobody is its own drawing.
    """
    stem = SIGNS.sub("", PurePosixPath(path).stem)
    stem = "-".join(PEOPLE.get(point, point) for point in stem.split("-"))
    if FAMILY.fullmatch(stem):
        stem = "1f46a"
    return SEQUENCES.get(stem, stem) + PurePosixPath(path).suffix


def split_of(shown: str) -> str:
    """Return "test" or "train" from a drawing alone: fixed, whatever else is in the file."""
    position = int.from_bytes(hashlib.sha256(shown.encode()).digest()[:8], "big") / 2**64
    return "test" if position < TEST_SHARE else "train"


def rows(package: Path) -> list[dict]:
    """Read every base emoji that has a Google picture and a category, in Unicode's own order.

    Raises:
        ValueError: the folder is not the unpacked package, or the split came out too small.
    """
    listing = package / "emoji.json"
    if not listing.is_file():
        raise ValueError(f"{package} has no emoji.json: give the unpacked npm package")
    entries = json.loads(listing.read_text())
    table = []
    same: dict[bytes, str] = {}  # pixels -> their first drawing: Norway's flag is also Bouvet's
    for entry in sorted(entries, key=lambda entry: (entry["sort_order"], entry["image"])):
        if not entry["has_img_google"] or entry["category"] in (None, "", LEFT_OUT):
            continue
        path = entry["image"]
        data = (package / "img/google/64" / path).read_bytes()
        shown = same.setdefault(pixels(data), drawing(path))
        table.append(
            {
                "image": {"bytes": data, "path": path},
                "name": entry["name"],
                "category": entry["category"],
                "subcategory": entry["subcategory"],
                "split": split_of(shown),
            }
        )
    num_test = sum(row["split"] == "test" for row in table)
    if num_test < FEWEST_TEST:
        raise ValueError(f"{num_test} held-out emoji: at least {FEWEST_TEST} are wanted")
    if len({PurePosixPath(row["image"]["path"]).stem for row in table}) != len(table):
        raise ValueError("two emoji share a file name, so a path stem cannot be the sample_id")
    return table


def pixels(data: bytes) -> bytes:
    """Return what a file looks like over white."""
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    over_white = Image.new("RGBA", picture.size, "white")
    over_white.alpha_composite(picture)
    return over_white.tobytes()


def main() -> None:
    """Write the Parquet file next to this script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="folder of the unpacked npm package")
    target = Path(__file__).with_name("emoji.parquet")
    table = pa.Table.from_pylist(rows(parser.parse_args().package), schema=SCHEMA)
    table = table.replace_schema_metadata({"huggingface": HUGGINGFACE})
    # PNG does not compress again; without dictionary and statistics of the bytes the file is small.
    pq.write_table(
        table,
        target,
        compression="none",
        use_dictionary=["category", "subcategory", "split"],
        write_statistics=["category", "subcategory", "split"],
        row_group_size=512,
    )
    counts = table.group_by("split").aggregate([("name", "count")]).to_pylist()
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    print(f"{target.name}: {counts}, {target.stat().st_size:,} bytes, sha256 {digest}")


if __name__ == "__main__":
    main()
