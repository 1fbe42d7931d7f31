"""Dense or unstructured networks to N:M without training them."""

from sparseprop.conversion.batchnorm import reestimate_batch_norm
from sparseprop.conversion.convert import convert
from sparseprop.conversion.job import ConvertProgress
from sparseprop.conversion.layer import Reconstruction
from sparseprop.conversion.report import ConversionReport, LayerReport

__all__ = [
    "ConversionReport",
    "ConvertProgress",
    "LayerReport",
    "Reconstruction",
    "convert",
    "reestimate_batch_norm",
]
