"""Puts VRAM Fit into a workflow of ComfyUI: between every sampler or guider and its model. Needs nothing but Python.

    python scripts/insert_vram_fit.py GRAPH.json [--out FILE] [--budget AMOUNT]

GRAPH.json is a file that ComfyUI's page has saved (not one for its API). The result is written beside it, as
GRAPH_vram_fit.json, or to FILE; everything else in it stays as it was.

Exit status: 0 it was written, 1 it was not, 2 wrong arguments.
"""

import argparse
import json
import sys
from pathlib import Path

from graphs.insertion import insert_vram_fit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph", type=Path, metavar="GRAPH.json", help="a workflow file")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the file to write")
    parser.add_argument("--budget", default="auto", help="auto (all that is free), or an amount such as 6 or 6GiB")
    options = parser.parse_args()
    graph: Path = options.graph
    out: Path = options.out or graph.with_name(f"{graph.stem}_vram_fit.json")
    try:
        workflow = json.loads(graph.read_text("utf-8"))
        if not (isinstance(workflow, dict) and isinstance(workflow.get("nodes"), list)):
            raise ValueError("it is not a workflow that ComfyUI's page has saved")
        inserted = insert_vram_fit(workflow, budget=options.budget)
        if not inserted:
            raise ValueError("no sampler or guider in it lacks a VRAM Fit")
        out.write_text(json.dumps(workflow, ensure_ascii=False, indent=2) + "\n", "utf-8")
    except (OSError, ValueError) as error:
        print(f"{graph}: {error}", file=sys.stderr)
        return 1
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        print(f"{graph}: it is damaged, or of a format that is not known ({error!r})", file=sys.stderr)
        return 1
    print(f"{out}: {len(inserted)} VRAM Fit inserted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
