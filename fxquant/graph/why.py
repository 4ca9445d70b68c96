"""The codes of all decisions, and the sentence of each in reports."""

from __future__ import annotations

import enum
from typing import NamedTuple


class Why(enum.Enum):
    """Why a candidate stays float: a code, whose value is the sentence, with places for its details."""

    ASKED = "the mapping says float"
    NO_ENTRY = "no mapping entry covers it"
    OTHER_QCONFIG = "its qconfig ({}) is for other operators; this one takes: {}"
    TOLD = "{}"  # the text of its operator's refuse_module or refuse_call, or of an old checkpoint
    NO_FORM = "there is no quantized form of {}"
    NO_CONVOLUTION = "{} has no dynamic form: of convolutions, the modules nn.Conv1d and nn.Conv2d have one"
    NO_BILINEAR = "{} multiplies two inputs with each other; only forms of one input are quantized"
    OWN_FORWARD = "it is a subclass of {} that has a forward of its own"
    REDEFINES = "it is a subclass of {} that redefines {}"
    UNTRACED = "its forward is not traced, so calls with weights of its own are out of reach"
    REPLACED_FORWARD = "its forward was replaced on the instance"
    HELD_FORWARD = "self.{} of {} holds its forward; let it hold the module"
    SCRIPTED = "it is compiled to TorchScript; put the nn.Module that it was made from in its place"
    WRAPPER = "{} is a wrapper; put what it holds, its .{}, in its place"
    READ_BY_PARENT = "{} reads its children's weights itself"
    EXTRA_STATE = "it keeps extra state (get_extra_state), for which its quantized form has no place"
    IN_A_CONTAINER = "it is in a plain {}, self.{}; put it into an nn.ModuleList or -Dict"
    NOT_REGISTERED = "its weight is not a registered parameter or buffer"
    NOT_ALONE = "only a form of one constant, its {!r}, is quantized"
    NOT_2D = "its weight is {}-D, not 2-D"
    MORE_OPERANDS = "it is called with more than {}"
    WEIGHT_IS_INPUT = "its weight is its input too"
    CAST = "its weight is cast to another dtype at each call"
    COMPUTED_BIAS = "its bias is computed at each call"
    WRITTEN = "forward writes into its weight or bias as it runs"
    PRESERVED_WRITES = "preserved code may write into it"
    USED_BESIDE = "code beside the graph uses it as it is"
    HOOKED = "it has a hook, which would see integers"
    PASSED_BY = (
        "forward calls the float layer by a reference that no copy of the model can follow (in a global, a class, a "
        "local class); let it call the layer by an attribute of the model"
    )
    UNCALLED = (
        "the example calls it in float, but not once it alone is quantized: forward picks layers by their type "
        "(isinstance)"
    )
    CALLED_LESS = (
        "the example calls it {} times in float, but {} with it alone quantized: forward picks layers by their type "
        "(isinstance)"
    )


class NotFused(enum.Enum):
    """Why a chain is not fused; the value is the sentence, as with Why."""

    USED_BESIDE = "code beside the graph uses {}"
    HOOKED = "{} has a hook, which would see something else"
    READ_ELSEWHERE = "something else reads what {} gives"
    CALLED_ELSEWHERE = "{} is called, or its tensors are read, elsewhere too"
    NO_LAYER = "there is no nn.Linear or convolution module right before it to fold it into"
    OTHER_NORM = "a {} is not folded into a {}"
    TRAINING = "the normalization is in training mode"
    NO_STATISTICS = "the normalization keeps no running statistics"
    OTHER_CHANNELS = "the normalization has {} channels, the layer {}"
    OTHER_RANK = "the layer gives {}-D values, and the normalization is over its outputs only if they are {}-D"


class StaysFloat(enum.Enum):
    """Why a value between static layers stays float; the value is the sentence, as with Why."""

    NO_FORM = "it has no integer form"
    OTHER_ARGUMENTS = "it has no integer form with these arguments, dtypes or a hook"
    READS_FLOATS = "it reads a value that stays float"
    READ_AS_FLOATS = "what reads it computes with floats"


class Reason(NamedTuple):
    """Why one candidate or value stays float, or one chain is not fused: a code, and the details of its sentence."""

    why: Why | NotFused | StaysFloat
    details: tuple[str, ...] = ()

    def __str__(self) -> str:
        return str(self.why.value).format(*self.details)


def because(why: Why | NotFused | StaysFloat, *details: object) -> Reason:
    """Return a reason, its details as text."""
    return Reason(why, tuple(map(str, details)))


class Rounded(enum.Enum):
    """How a weight was rounded; the value is what reports say."""

    TO_NEAREST = ""
    GPTQ = "with GPTQ"
    NO_CONVOLUTION = "to nearest: GPTQ is for convolutions without groups, not transposed, that met inputs in data"
    NO_INPUT = "to nearest: it met no input in data"
    NOT_FINITE = "to nearest: its inputs in data were not finite, or too large"
