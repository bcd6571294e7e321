"""Scores with their uncertainty: numpy and scipy only, usable alone (`from posttrain import stats`).

Every result has .value, .low, .high, .se, .n (and .clusters, .method, .as_dict()). Examples, never the tokens inside
them, are what is resampled.
"""

from posttrain.stats.bins import BinSums, bin_edges, bin_index, bin_sums, fold_pairs, merge_equal_mass
from posttrain.stats.calibration import brier, ece, ece_from_bins, mce, mce_from_bins
from posttrain.stats.calibration_error import CalibrationError
from posttrain.stats.compare import paired_difference
from posttrain.stats.differences import PairedDifference
from posttrain.stats.estimate import Estimate
from posttrain.stats.fine_bins import BIN_COLUMNS, bins_of, equal_width, fine_bins, is_fine, without
from posttrain.stats.intervals import accuracy, clustered_wilson, wald, wilson
from posttrain.stats.ratios import bits_per_byte, bits_per_char, bits_per_token, bootstrap, nll, perplexity
from posttrain.stats.records import LOWER_IS_BETTER, NEITHER, paired, summarise
from posttrain.stats.reliability import ReliabilityBin, reliability
from posttrain.stats.significance import holm, mcnemar, smallest_detectable
from posttrain.stats.temperature import Temperature, fit_temperature
from posttrain.stats.temperature_grid import fit_temperature_on_grid, held_out, held_out_ece, temperature_grid

__all__ = [
    "BIN_COLUMNS",
    "LOWER_IS_BETTER",
    "NEITHER",
    "BinSums",
    "CalibrationError",
    "Estimate",
    "PairedDifference",
    "ReliabilityBin",
    "Temperature",
    "accuracy",
    "bin_edges",
    "bin_index",
    "bin_sums",
    "bins_of",
    "bits_per_byte",
    "bits_per_char",
    "bits_per_token",
    "bootstrap",
    "brier",
    "clustered_wilson",
    "ece",
    "ece_from_bins",
    "equal_width",
    "fine_bins",
    "fit_temperature",
    "fit_temperature_on_grid",
    "fold_pairs",
    "held_out",
    "held_out_ece",
    "holm",
    "is_fine",
    "mce",
    "mce_from_bins",
    "mcnemar",
    "merge_equal_mass",
    "nll",
    "paired",
    "paired_difference",
    "perplexity",
    "reliability",
    "smallest_detectable",
    "summarise",
    "temperature_grid",
    "wald",
    "wilson",
    "without",
]
