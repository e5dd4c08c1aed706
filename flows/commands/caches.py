"""`eupe cache`: build, list, inspect, verify and mend teacher features on disk."""

import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from flows.commands.printing import print_json, print_table
from pipelines.recipe.words import AsJson, Overrides, RecipeName

if TYPE_CHECKING:
    from cache.store import Store
    from cache.verify import Progress

app = typer.Typer(
    no_args_is_help=True,
    help="Teacher features on disk: build them once, train from them ever after.",
)

Root = Annotated[
    Path | None,
    typer.Argument(
        help="Cache root. Left out: that of the [b]demo[/b] recipe.", show_default=False
    ),
]


@app.command("build")
def build(
    recipe: RecipeName = "demo",
    deep: Annotated[
        bool,
        typer.Option("--deep", help="At the end compare every byte with its recorded checksum."),
    ] = False,
    everything: Annotated[
        bool,
        typer.Option(
            "--all", help="All views of all samples, not only those that the stages will draw."
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Begin though the disk has no room for all of it.")
    ] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Compute what is missing of a recipe's caches, the proxy's too once stage 1 is done.

    Of the training views those are computed that the recipe's stages will draw, which is known
    before: on few pictures all of them, on a hundred million a part.

    Kill it whenever you like: the same command goes on with the shards that are missing, and
    gives the same bytes.

    [b]Where pictures come from[/b]: the fields of train.NAME.source and of held_out.source. Each
    picture has an id for ever, and labels, of which evaluation.label is what kNN predicts.

    kind=folder: path is a folder of pictures. The id is the path without the extension; the label
    [b]label[/b] is the top folder.

    kind=webdataset: path is a tar, a folder of tars or a pattern, train-{000..099}.tar. The id is
    the key, a path up to the first dot of its base name; image_member names the field that is its
    picture, where there are several. Its fields cls, txt and json are labels; [b]label[/b] is the
    top folder in the tar or, by classes=tar, the tar's name. key=shard puts the tar's name before
    keys that are unique in one tar only; key=path makes a sample of every picture.

    kind=parquet: image_column holds the bytes. The id is its path without the extension, or
    key_column (__row__: file and row number); label_columns are the labels, nested ones as
    meta.wnid. Class names are the file's own.

    where keeps the samples with these labels: where.split=train. More: docs/sources.md.
    """
    from pipelines.recipe import recipes

    whole = ["extraction.everything=true"] if everything else []
    asked = recipes.get(recipe, [*(overrides or []), *whole])
    from pipelines.caching import beforehand, planning
    from pipelines.caching.precompute import build
    from pipelines.recipe.stores import job_groups

    beforehand.check(asked)
    beforehand.check_cluster(asked)
    groups = job_groups(asked)

    def look_over() -> None:
        beforehand.check_labels(asked)
        if not force:
            planning.check_room(asked, groups)

    built = build(groups, deep, look_over=look_over)
    if not as_json:
        print(built)
        return
    print_json(
        {
            "shards_computed": built.num_shards,
            "seconds": built.seconds,
            "datasets": [
                {
                    "name": each.dataset,
                    "samples": each.num_samples,
                    "new": each.num_new,
                    "left_out": each.failures.to_dicts(),
                }
                for each in built.indexed
            ],
            "stores": [str(store.directory) for store in built.stores],
        }
    )


@app.command("ls")
def list_stores(root: Root = None, as_json: AsJson = False) -> None:
    """List the feature stores of a cache root."""
    from cache.listing import store_lines

    lines = store_lines(root_of(root))
    if as_json:
        print_json(lines)
    elif lines:
        print_table(lines)
    else:
        print(f"{root_of(root)}: no stores yet; `eupe cache build` makes them")


@app.command("inspect")
def inspect(
    store: Annotated[Path, typer.Argument(help="Folder of a store, as `eupe cache ls` names it.")],
    as_json: AsJson = False,
) -> None:
    """Say what one store holds: its spec, moments, shards, invalid rows and provenance."""
    from cache.listing import describe

    description = describe(store)
    if as_json:
        print_json(description)
        return
    Console(width=None if sys.stdout.isatty() else 200).print_json(json.dumps(description))


@app.command("verify")
def verify(
    root: Root = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Sizes, indexes and tables only; not every byte.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check every committed file against its recorded checksum; exit code 1 if one is wrong.

    Everything is looked at, sample tables too, whatever of it is damaged.
    """
    from cache.verify import verify_root

    def shown(store: "Store") -> "AbstractContextManager[Progress]":
        name, total = store.spec.directory(), store.manifest().total().num_shards
        return shards_shown(f"Verifying {name}", total)

    base = root_of(root)
    lines, problems = [], list[str]()
    for name, report in verify_root(base, not quick, shown):
        problems += [str(problem) for problem in report.problems]
        lines.append(
            {
                "store": name,
                "shards": report.num_shards,
                "rows": report.num_rows,
                "invalid": report.num_invalid,
                "bytes_read": report.num_bytes,
                "problems": len(report.problems),
            }
        )
    if as_json:
        print_json({"stores": lines, "problems": problems})
    elif lines:
        print_table(lines)
    else:
        print(f"{base}: no stores to verify")
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise typer.Exit(1)


@app.command("derive")
def derive(
    store: Annotated[Path, typer.Argument(help="Folder of a store, as `eupe cache ls` names it.")],
    codec: Annotated[
        str | None,
        typer.Option(help="What to keep features in. Left out: as the store.", show_default=False),
    ] = None,
    views: Annotated[
        int | None,
        typer.Option(help="The first so many. Left out: all.", min=1, show_default=False),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help="So many, drawn by their ids' hashes. Left out: all.", min=1, show_default=False
        ),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(help="Cache root to put it in. Left out: the store's.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a cheaper store of a richer one, without a pass of the teacher.

    Another codec, fewer views, fewer samples. Kill it whenever you like: the same command goes on.

    From a float32 store comes what a build with that codec would have made, and recipes find it as
    such. Any other has rounded the features first: the codec is then "rot4 of float16", and so a
    recipe has to name it: [b]codec: rot4 of float16[/b]. (Grid codecs: "grid1 of float32" too.)

    Fewer views or samples want a root of their own, which --root names.
    """
    from pipelines.caching.derive import derive

    here = store.resolve()
    shown = partial(shards_shown, f"Deriving from {here.parent.name}")
    asked = here.parents[3] if root is None else root_of(root)
    done = derive(here, asked, codec, views, samples, shown)
    if as_json:
        print_json(
            {
                "store": str(done.store.directory),
                "codec": done.codec,
                "shards": done.num_shards,
                "samples": done.num_samples,
                "bytes": done.num_bytes,
            }
        )
        return
    print(
        f"{done.store.directory}: {done.codec}, {done.num_samples} samples, "
        f"{done.num_bytes} bytes, {done.num_shards} shards written now"
    )


@app.command("drop")
def drop(
    dataset: Annotated[str, typer.Argument(help="Name of the dataset.")],
    sample_ids: Annotated[list[str], typer.Argument(help="Ids of the samples.")],
    root: Annotated[
        Path | None,
        typer.Option(
            help="Cache root. Left out: that of the [b]demo[/b] recipe.", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Take samples out of a dataset, with all that its stores hold of them, pixels too.

    Their rows become invalid, with the reason "dropped"; all other rows keep their bytes. No later
    build or index brings them back. Their ids stay in the sample table, and what they were in the
    mean of moments stays there. Shards are written anew: a run that is pinned to an older version
    is refused when it comes to one of them, and a new run is to be started. Mirrors of a bucket
    keep old copies until they are evicted: delete their folders. Let no build run meanwhile.
    """
    from cache import dropping

    shown = partial(shards_shown, f"Dropping samples of {dataset}")
    done = dropping.drop(root_of(root), dataset, sample_ids, shown)
    if as_json:
        print_json({"dropped": done.num_samples, "shards": done.num_shards, "rows": done.num_rows})
        return
    print(
        f"{done.num_rows} rows of {done.num_shards} shards have lost their features; "
        f"{done.num_samples} samples of {dataset} are dropped now"
    )


@app.command("gc")
def collect_garbage(
    root: Root = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete it. Left out: only list it.")] = False,
    older_than: Annotated[
        float,
        typer.Option(
            help="Hours that nobody must have written to a file. A builder names what it writes "
            "within minutes; 0 is safe when nothing runs, on any machine.",
            min=0,
        ),
    ] = 24,
    as_json: AsJson = False,
) -> None:
    """List, and with [b]--yes[/b] delete, what killed work has left and nothing names.

    Exit code 1 if a store is damaged, whose files therefore stay.
    """
    from cache import orphans

    seconds = older_than * 3600
    found = orphans.find(root_of(root), seconds)
    gone = [each for each in found.orphans if not yes or orphans.remove(each, seconds)]
    num_bytes = sum(each.num_bytes for each in gone)
    if as_json:
        files = [{"path": str(e.path), "bytes": e.num_bytes, "what": e.what} for e in gone]
        untold = [str(problem) for problem in found.untold]
        print_json({"deleted": yes, "bytes": num_bytes, "files": files, "untold": untold})
    else:
        for each in gone:
            print(f"{each.path}: {each.what}, {each.num_bytes} bytes")
        print(f"{len(gone)} files, {num_bytes} bytes{' deleted' if yes else '; `--yes` deletes'}")
        for problem in found.untold:
            print(f"{problem}; nothing of it is deleted", file=sys.stderr)
    if found.untold:
        raise typer.Exit(1)


@app.command("repair")
def repair(
    root: Root = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Do it. Left out: only say what would be done.")
    ] = False,
    compute_batch: Annotated[
        int | None,
        typer.Option(
            help="extraction.compute_batch of the recipe; asked for where nothing tells it any "
            "more.",
            min=1,
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Mend a cache root from what is left of it; exit code 1 if something is lost for good.

    HEADs, manifests, spec.json and zarr.json are written anew. Shards that are damaged are
    deleted: [b]eupe cache build[/b] computes just these again. Every byte is read.
    """
    from cache.repair import repair_root

    def shown(name: str, total: int) -> "AbstractContextManager[Progress]":
        return shards_shown(f"Looking at {name}", total)

    mended, lost = list[str](), list[str]()
    for _, found in repair_root(root_of(root), yes, shown, compute_batch):
        mended += [str(problem) for problem in found.mended]
        lost += [str(problem) for problem in found.lost]
    if as_json:
        print_json({"mended" if yes else "would_mend": mended, "lost": lost})
    else:
        for line in mended:
            print(line)
        what = "mended" if yes else "to mend; `--yes` does it"
        print(f"{len(mended)} {what}, {len(lost)} lost for good")
        for line in lost:
            print(line, file=sys.stderr)
    if lost:
        raise typer.Exit(1)


@contextmanager
def shards_shown(what: str, total: int) -> "Iterator[Progress]":
    """Show how far something is with a store's shards."""
    from pipelines.machines.progress import track

    with track(total, what, "shards") as progress:
        yield lambda done, all_of_them: progress.advance()


def root_of(root: Path | None) -> Path:
    """Return the cache root the user named, or that of the demo.

    Raises:
        NotBuilt: a folder in or above a root is named.
    """
    from cache.format import layout
    from cache.listing import check_root

    if root is not None:
        named = layout.cache_root(root).resolve()
        check_root(named)
        return named
    from pipelines.recipe import recipes

    return layout.cache_root(recipes.get("demo").cache_root)
