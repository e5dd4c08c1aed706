"""Build emoji.parquet from the npm package emoji-datasource-google: real, labelled, free images.

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz
    python examples/emoji/build.py package

The PNG bytes are Google's Noto renderings, untouched. The `image` column is the struct that
Hugging Face `datasets` writes for an Image feature, so this is also an example of such a file.
"""

import argparse
import hashlib
import json
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

LEFT_OUT = "Component"  # skin-tone swatches: five, all alike, no picture of anything
TEST_SHARE = 0.25  # of the hash range; at least 400 queries are wanted, so the share is checked
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


def split_of(path: str) -> str:
    """Return "test" or "train" from the path alone: fixed, whatever else is in the file."""
    position = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64
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
    for entry in sorted(entries, key=lambda entry: (entry["sort_order"], entry["image"])):
        if not entry["has_img_google"] or entry["category"] in (None, "", LEFT_OUT):
            continue
        path = entry["image"]
        table.append(
            {
                "image": {"bytes": (package / "img/google/64" / path).read_bytes(), "path": path},
                "name": entry["name"],
                "category": entry["category"],
                "subcategory": entry["subcategory"],
                "split": split_of(path),
            }
        )
    num_test = sum(row["split"] == "test" for row in table)
    if num_test < FEWEST_TEST:
        raise ValueError(f"{num_test} held-out emoji: at least {FEWEST_TEST} are wanted")
    if len({PurePosixPath(row["image"]["path"]).stem for row in table}) != len(table):
        raise ValueError("two emoji share a file name, so a path stem cannot be the sample_id")
    return table


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
