"""The notebooks, and what their cells print."""

from typing import Any

from tests.helpers import ROOT

NOTEBOOKS = QUICKSTART, RECEIPTS, TPU = [
    ROOT / "notebooks" / f"{name}.ipynb" for name in ("quickstart", "receipts", "tpu")
]


def printed(notebook: Any) -> dict[str, str]:
    """Return the standard output of each cell of code, by its id.

    On the other there may be a warning, as that kernels are missing.
    """
    return {
        cell.id: "".join(each.text for each in cell.outputs if each.get("name") == "stdout")
        for cell in notebook.cells
        if cell.cell_type == "code"
    }


def images(notebook: Any) -> dict[str, list[str]]:
    """Return the images of each cell that has any, in base64."""
    found = {
        cell.id: [
            each.data["image/png"] for each in cell.outputs if "image/png" in each.get("data", {})
        ]
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    return {name: pictures for name, pictures in found.items() if pictures}
