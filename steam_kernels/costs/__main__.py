"""python -m steam_kernels.costs prints the costs of gates in a network as a Markdown table."""

from __future__ import annotations

import argparse

from .networks import NETWORKS, markdown


def main() -> None:
    """Prints one table for each requested network."""
    parser = argparse.ArgumentParser(prog="python -m steam_kernels.costs", description=__doc__)
    parser.add_argument("--model", choices=(*NETWORKS, "all"), default="resnet50", help="a torchvision network")
    parser.add_argument("--size", type=int, default=224, help="height and width of the image in pixels")
    given = parser.parse_args()
    names = NETWORKS if given.model == "all" else (given.model,)
    try:
        print("\n\n".join(markdown(name, given.size) for name in names))
    except (ImportError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
