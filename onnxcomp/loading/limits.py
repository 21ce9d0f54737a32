"""What a model file may ask for before it is refused."""

from dataclasses import dataclass

MEBIBYTE = 2**20
GIBIBYTE = 2**30


@dataclass(frozen=True, kw_only=True)
class LoadLimits:
    """Upper bounds on a model file; every field is the largest value that is accepted.

    Attributes:
        model_bytes: Size of an ONNX file; protobuf itself ends at 2 GiB.
        total_bytes: Size of an ONNX file and its external data files together; of a packed
            file, and of the weights in it.
        fields: Protobuf fields in the model file, payloads of tensors not counted.
        message_depth: Nesting of protobuf messages; one sub-graph takes three.
        varint_bytes: Bytes of packed variable-length integers; each may become 8 in memory.
        name_bytes: Length of any name, operator or domain.
        nodes: Nodes in all graphs, and after expansion of the local functions.
        attributes: Attributes of one node.
        graph_depth: Sub-graphs (of If, Loop, Scan) inside one another.
        loop_trips: Iterations of a Loop; for nested ones their product.
        rank: Dimensions of a tensor.
        elements: Elements of a tensor.
        padding: Padding of a Conv or a pooling node on one side of one axis.
    """

    model_bytes: int = 2 * GIBIBYTE - 1
    total_bytes: int = 4 * GIBIBYTE
    fields: int = 1_000_000
    message_depth: int = 64
    varint_bytes: int = 64 * MEBIBYTE
    name_bytes: int = 1024
    nodes: int = 20_000
    attributes: int = 64
    graph_depth: int = 8
    loop_trips: int = 10_000
    rank: int = 8
    elements: int = 2**31
    padding: int = 4096
