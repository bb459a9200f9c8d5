"""Evaluates a run's newest checkpoint on its held-out examples, or samples from it.

--lengths scores the same held-out tokens after contexts of several lengths; --config puts the run's
parameters into another model that has the same, such as one with another mask.

python eval.py --workdir=runs/quickstart
python eval.py --workdir=runs/quickstart --prompt="def " --length=100 --temperature=0.7
python eval.py --workdir=runs/lm_infinite --lengths=128,256,512,1024,2048
python eval.py --workdir=runs/lm_infinite --config=configs/lm_infinite.py:mixer=attention
"""

import sys

from efficient.cli import main_guard
from efficient.training import command


@main_guard
def main(argv: list[str]) -> None:
    command.evaluate(argv)


if __name__ == "__main__":
    main(sys.argv)
