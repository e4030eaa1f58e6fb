"""Scores a folder of videos with VBench. Its text is run by the Python that VBench is installed in.

That Python need not have this project, so nothing of it is imported here. Scores are left in
scores_eval_results.json of the output folder, as VBench writes them.
"""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["main"]


def main(dimension: str, videos: str, out: str) -> None:
    """Lets VBench score all of `videos` in one dimension, with weights that are there already."""
    import torch
    import vbench

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prompts = Path(vbench.__file__).parent / "VBench_full_info.json"
    vbench.VBench(device, str(prompts), out).evaluate(
        videos_path=videos,
        name="scores",
        dimension_list=[dimension],
        local=True,
        mode="custom_input",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
