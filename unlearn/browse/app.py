"""Open the browser. As it stands this is also the `app.py` of a Hub Space, which reads `space.json` beside it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


NEEDS = "needs Gradio: pip install 'medforget[app]'"
SPACE_SETTINGS = "space.json"
SPACE_REPORT = "run"
DATA, SPACE = "MEDFORGET_DATA", "SPACE_ID"


def browse(
    data: str | None,
    run: Path | None = None,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    on_space: bool = False,
) -> None:
    """
    Show a dataset, and a run if there is one, until Ctrl-C.

    Args:
        data (`str`, *optional*):
            A dataset folder, or a Hub id ORG/NAME; found as [`~medforget_dataset.load`] does.
        run (`Path`, *optional*):
            Folder of a run.
        host (`str`, *optional*, defaults to `"127.0.0.1"`), port (`int`, *optional*):
            Where to serve; by default the first free port from 7860 on.
        share (`bool`, *optional*, defaults to `False`):
            Ask Gradio for a public address.
        on_space (`bool`, *optional*, defaults to `False`):
            Whether this runs on the Hub.

    Raises:
        UserError: Gradio is not installed, the dataset or the run cannot be used, something is restricted and others
            could see it, or the port is taken.
    """
    from unlearn.browse.exposure import check_exposure, free_port
    from unlearn.browse.sources import find_restricted, open_data, open_run

    require_gradio()
    catalogue, reported = open_data(data), open_run(run)
    restricted = find_restricted(catalogue, reported)
    check_exposure(restricted, host=host, share=share, on_space=on_space)
    port = free_port(host, port)

    from unlearn.browse.page import make_page, serve

    serve(make_page(catalogue, reported, restricted), reported, host=host, port=port, share=share)


def require_gradio() -> None:
    """Raise a `UserError` unless Gradio can be imported."""
    from medforget_dataset.errors import UserError

    # Before Gradio is imported, which reads it.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        if not str(error.name).startswith("gradio"):
            raise
        raise UserError(NEEDS) from None


def main() -> None:
    """Open the browser on a Space; the dataset is named by `MEDFORGET_DATA` or `space.json`."""
    folder = Path(__file__).resolve().parent
    settings = folder / SPACE_SETTINGS
    try:
        from medforget_dataset.errors import UserError
    except ImportError:
        sys.exit("app.py: needs MedForget and Gradio: pip install 'medforget[app]'")
    try:
        named = json.loads(settings.read_text(encoding="utf-8"))["data"] if settings.is_file() else None
    except (ValueError, TypeError, KeyError):
        sys.exit(f'app.py: {settings} is damaged; it should be {{"data": "ORG/NAME"}}')
    report = folder / SPACE_REPORT
    on_space = bool(os.environ.get(SPACE))
    # Where the Hub looks for the page.
    host, port = ("0.0.0.0", 7860) if on_space else ("127.0.0.1", None)
    try:
        data = os.environ.get(DATA) or named
        browse(data, report if report.is_dir() else None, host=host, port=port, on_space=on_space)
    except UserError as error:
        sys.exit(f"app.py: {error}")


if __name__ == "__main__":
    main()
