"""The data of the DLRM example: real purchases, Criteo logs, or a calibrated synthetic stream.

    python examples/dlrm/data.py                          # what the purchases hold
    python examples/dlrm/data.py --synthetic kaggle       # the generator beside the numbers it was fitted to
    python examples/dlrm/data.py --data /path/train.txt   # checks a Criteo file, line by line

The sources live in data_purchases.py, data_criteo.py and data_synthetic.py; all give batches as in batches.py.
"""

import argparse
import sys
from typing import Any

from batches import ClickData, DataError
from data_criteo import open_criteo
from data_purchases import PurchaseData
from data_synthetic import COVERAGE_SHARES, PRESETS, SyntheticData, calibration

__all__ = ["open_data"]


def open_data(
    source: str = "purchases", synthetic: str | None = None, seed: int = 0, options: dict[str, Any] | None = None
) -> ClickData:
    """The data source by name.

    Args:
        source (str): "purchases", or the path of a Criteo TSV file or of a folder of day_N_*.npy.
        synthetic (str, optional): a preset; goes before `source`.
        options (dict, optional): keywords of the source's class.
    """
    options = dict(options or {})
    if synthetic is not None:
        return SyntheticData(synthetic, seed=seed, **options)
    if source == "purchases":
        return PurchaseData(seed=seed, **options)
    return open_criteo(source, **options)


def _print_calibration(preset: str, num_draws: int, scale: float) -> None:
    if preset not in PRESETS:
        raise DataError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    shares = " ".join(f"{'top %g%%' % (100 * share):>9}" for share in COVERAGE_SHARES)
    print(f"{preset}, scale {scale:g}, {num_draws:,} draws a table; share of accesses on the hottest rows, in %")
    print(
        f"{'table':>5} {'rows':>11} {'a':>6} {'q':>5} {'ranks/row':>9}  {'':9} {shares} {'distinct':>10} {'M ids/s':>8}"
    )
    for line in calibration(preset, num_draws, scale):
        law = "uniform" if line.fit.uniform else f"{line.fit.a:6g} {line.fit.q:5g} {line.fit.ranks_per_row:9.4g}"
        rows = [("drawn", line.drawn_coverage), ("law", line.law_coverage)]
        if line.fit.fitted_coverage is not None and scale == 1:
            rows.append(("published", line.fit.fitted_coverage))
        for number, (name, coverage) in enumerate(rows):
            left = f"{line.table:>5} {line.num_rows:>11,} {law:>22}" if number == 0 else " " * 40
            right = f"{line.num_distinct:>10,} {line.ids_per_second / 1e6:>8.1f}" if number == 0 else ""
            print(f"{left}  {name:9} " + " ".join(f"{100 * share:>9.1f}" for share in coverage) + " " + right)


def _print_summary(data: ClickData, batch_size: int) -> None:
    num_samples, num_positive = 0, 0.0
    for batch in data.train_batches(batch_size):
        num_samples += batch.num_samples
        num_positive += float(batch.labels.sum())
    num_test, num_test_positive = 0, 0.0
    for batch in data.test_batches(batch_size):
        num_test += batch.num_samples
        num_test_positive += float(batch.labels.sum())
    for name, size in zip(data.table_names, data.table_sizes):
        print(f"{name:28} {size:>12,} rows")
    print(f"{len(data.table_sizes)} tables, {sum(data.table_sizes):,} rows; {data.num_dense} dense features")
    print(f"training: {num_samples:,} samples, {num_positive / max(1, num_samples):.4f} of them positive")
    print(f"held out: {num_test:,} samples, {num_test_positive / max(1, num_test):.4f} of them positive")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="purchases", help="purchases, a Criteo TSV file, or a folder of day_N_*.npy")
    parser.add_argument("--synthetic", metavar="PRESET", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--draws", type=int, default=2_000_000, help="draws per table of the calibration")
    parser.add_argument("--scale", type=float, default=1.0, help="rows of the synthetic tables over the preset's")
    arguments = parser.parse_args()
    try:
        if arguments.synthetic:
            _print_calibration(arguments.synthetic, arguments.draws, arguments.scale)
        else:
            _print_summary(open_data(arguments.data), batch_size=16_384)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
