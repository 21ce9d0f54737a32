"""The passes: one file each, listed here by hand."""

from collections.abc import Mapping
from types import MappingProxyType

from onnxcomp.passes.base import Pass
from onnxcomp.passes.factorize import Factorize
from onnxcomp.passes.factorize_jointly import FactorizeJointly
from onnxcomp.passes.fold_batchnorm import FoldBatchnorm
from onnxcomp.passes.fold_constants import FoldConstants
from onnxcomp.passes.make_biases_explicit import MakeBiasesExplicit
from onnxcomp.passes.merge_initializers import MergeInitializers
from onnxcomp.passes.remove_channels import RemoveChannels
from onnxcomp.passes.remove_dead import RemoveDead
from onnxcomp.passes.remove_identities import RemoveIdentities

PASSES: Mapping[str, type[Pass]] = MappingProxyType(
    {
        pass_.name: pass_
        for pass_ in (
            Factorize,
            FactorizeJointly,
            FoldBatchnorm,
            FoldConstants,
            MakeBiasesExplicit,
            MergeInitializers,
            RemoveChannels,
            RemoveDead,
            RemoveIdentities,
        )
    }
)
"""Every pass by the name that recipes and `--methods` use."""

PREPARE: tuple[Pass, ...] = (
    FoldConstants(),
    RemoveIdentities(),
    MergeInitializers(),
    RemoveDead(),
)
"""Exact passes before the search; they keep BatchNorm."""

FINISH: tuple[Pass, ...] = (
    FoldBatchnorm(),
    RemoveIdentities(),
    MergeInitializers(),
    RemoveDead(),
)
"""Exact passes that end every compression."""
