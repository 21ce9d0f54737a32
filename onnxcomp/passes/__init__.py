"""The passes: one file each, listed here by hand."""

from collections.abc import Mapping
from types import MappingProxyType

from onnxcomp.passes.base import NodePass, Pass
from onnxcomp.passes.compress_collaboratively import CompressCollaboratively
from onnxcomp.passes.emit_codebook import EmitCodebook
from onnxcomp.passes.factorize import Factorize
from onnxcomp.passes.factorize_jointly import FactorizeJointly
from onnxcomp.passes.fold_batchnorm import FoldBatchnorm
from onnxcomp.passes.fold_constants import FoldConstants
from onnxcomp.passes.make_biases_explicit import MakeBiasesExplicit
from onnxcomp.passes.merge_initializers import MergeInitializers
from onnxcomp.passes.prune_weights import PruneWeights
from onnxcomp.passes.remove_channels import RemoveChannels
from onnxcomp.passes.remove_dead import RemoveDead
from onnxcomp.passes.remove_identities import RemoveIdentities
from onnxcomp.passes.share_weights import ShareWeights
from onnxcomp.passes.substitute_operators import SubstituteOperators

PASSES: Mapping[str, type[Pass]] = MappingProxyType(
    {
        pass_.name: pass_
        for pass_ in (
            CompressCollaboratively,
            EmitCodebook,
            Factorize,
            FactorizeJointly,
            FoldBatchnorm,
            FoldConstants,
            MakeBiasesExplicit,
            MergeInitializers,
            PruneWeights,
            RemoveChannels,
            RemoveDead,
            RemoveIdentities,
            ShareWeights,
            SubstituteOperators,
        )
    }
)
"""Every pass by the name that recipes and `--methods` use."""

NODE_PASSES: Mapping[str, NodePass] = MappingProxyType(
    {pass_.name: pass_ for pass_ in (Factorize(), SubstituteOperators())}
)
"""Those whose options are forms of single nodes, which the search measures."""

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
