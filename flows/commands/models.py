"""`eupe export`, `encode` and `explore`: what is done with a model that is trained."""

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.printing import print_json, print_table
from pipelines.recipe.words import AsJson

app = typer.Typer()

Stage = Annotated[
    str | None,
    typer.Option(help="Stage of the run whose student is meant. Left out: the last one trained."),
]


@app.command("export")
def export(
    run: Annotated[Path, typer.Argument(help="Run directory of a recipe, for instance runs/demo.")],
    to: Annotated[Path, typer.Option(help="Folder to write; it is new, or empty.")],
    stage: Stage = None,
    images: Annotated[
        str | None,
        typer.Option(
            help="Pictures to compare the student with itself on: folder, tars or Parquet files. "
            "Left out: the held-out ones of its recipe.",
            show_default=False,
        ),
    ] = None,
    onnx: Annotated[
        bool, typer.Option(help="Write ONNX too; it wants [b]pip install 'eupe\\[release]'[/b].")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Take a trained student home: a folder for timm, ONNX and the released names, with its card.

    Every file is read again and compared with the student: bit for bit, ONNX within 1e-4. The
    licence that follows from its teachers and pictures is on the card.
    """
    from pipelines.release.export import export

    done = export(run, to, stage, images, onnx)
    if as_json:
        print_json(
            {
                "folder": str(done.folder),
                "files": dict(done.files),
                "left_out": dict(done.left_out),
                "licence": done.licence.licence,
                "licence_words": done.licence.words,
                "graph": done.graph and done.graph._asdict(),
            }
        )
        return
    print_table([{"file": name, "what": what} for name, what in done.files])
    for name, why in done.left_out:
        print(f"no {name}: {why}")
    print(f"licence: {done.licence.words}")
    print(done.folder)


@app.command("encode")
def encode(
    images: Annotated[
        str,
        typer.Argument(help="Pictures: a folder, tars or Parquet files, or a glob of them."),
    ],
    model: Annotated[
        str,
        typer.Option(
            help="Run directory, folder of [b]eupe export[/b], or a network of timm or open_clip "
            "([b]vit_small_patch16_dinov3.lvd1689m[/b], [b]ViT-B-32:openai[/b])."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    patches: Annotated[
        Path | None,
        typer.Option(help="Folder for the patches, as a Zarr v3 array. Left out: none are kept."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Weights of a network of timm or open_clip, as in a recipe ([b]file:PATH[/b]). "
            "Left out: its own download.",
            show_default=False,
        ),
    ] = None,
    stage: Stage = None,
    resolution: Annotated[
        int | None,
        typer.Option(
            help="Side of the network's input, pixels. Left out: that of the run, or the one that "
            "the network was made for.",
            show_default=False,
        ),
    ] = None,
    image_column: Annotated[str, typer.Option(help="Parquet: the pictures' column.")] = "image",
    key_column: Annotated[
        str | None,
        typer.Option(
            help="Parquet: the column that names a picture. Left out: its path.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Pictures a forward pass.", min=1)] = 32,
    device: Annotated[
        str | None,
        typer.Option(help="To compute on. Left out: the GPU if there is one.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show pictures to a model: embeddings, their map (PCA) and each picture's ten neighbours.

    Nothing is cached or trained. Pictures that cannot be used are left out, with the reason.
    """
    from pipelines.release import encode as encoding
    from pipelines.release import models, pictures

    asked = models.at(models.named(model, weights, stage), resolution)
    source = pictures.source_of(images, image_column, key_column)
    done = encoding.encode(source, asked, out, patches, batch=batch, device=encoding.device(device))
    if as_json:
        print_json(
            {
                "file": str(done.file),
                "pictures": done.num_pictures,
                "width": done.width,
                "left_out": dict(done.left_out),
                "aside": list(done.aside),
                "patches": done.patches and str(done.patches),
            }
        )
        return
    for line in done.aside:
        print(line)
    for name, why in done.left_out:
        print(f"left out: {name}: {why}")
    print(f"{done.num_pictures} pictures, {done.width} wide, {len(done.left_out)} left out")
    print(done.file)


@app.command("explore")
def explore(
    table: Annotated[Path, typer.Argument(help="Parquet file of [b]eupe encode[/b].")],
    port: Annotated[
        int | None,
        typer.Option(help="To listen on, on this machine alone. Left out: a free one."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Serve it, ask for one page and the table, and end.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    r"""Open a table of embeddings in a browser, by embedding-atlas; Ctrl-C ends it.

    It wants [b]pip install 'eupe\[explore]'[/b], and no network.
    """
    import time

    from pipelines.release import explore as exploring

    what = exploring.check(table)
    with exploring.served(table, port) as address:
        if check:
            page, rows = exploring.ask(address), exploring.ask(f"{address}{exploring.TABLE}")
        if as_json:
            print_json({"address": address, "what": what, "checked": check})
        else:
            print(f"{what}: {address}", flush=True)
        if check:
            if not as_json:
                print(f"answered: a page of {page} bytes, a table of {rows} bytes")
            return
        while True:
            time.sleep(3600)
