"""A hypothesis strategy for programs, and the networks that they describe."""

from hypothesis import reject
from hypothesis import strategies as st

from . import layers, parameters, wiring  # noqa: F401 — they register their operations
from .losses import LOSSES
from .operations import OPERATIONS, takes
from .programs import CALLS, Loss, Network, Node, Program, Unfit
from .weights import weights_of

_DRAWN = [name for name, operation in OPERATIONS.items() for _ in range(operation.weight)]
_WANTED = {wanted for operation in OPERATIONS.values() for wanted in operation.takes}
_INPUTS = st.sampled_from([(3,), (2, 3), (2, 3, 3), ("tokens", 3), (4,), (4, 2), (1, 4, 4), (3, 4), (1,), (2, 1, 2)])
_BATCH = st.sampled_from([3, 2, 4, 1])


def network_of(program: Program) -> Network:
    """The network of a program.

    Raises:
        Unfit: the program does not fit together, as one that was drawn does.
    """
    network = Network(program.inputs, program.batch, program.seed, program.leaf_inputs)
    for node in program.nodes:
        network.add(node, OPERATIONS[node.op].make)
    return network


def _numbers(network: Network, wanted: str, first: int | None) -> list[int]:
    """The values that an operation may take, those made last in front."""
    n, kinds = len(network.inputs), [not x.is_floating_point() for x in network.inputs]
    shape = None if first is None else network.shape(first)
    return [
        k for k in reversed(range(len(network.values))) if takes(wanted, network.shape(k), k < n and kinds[k], shape)
    ]


@st.composite
def programs(draw, most: int = 10, operation: str | None = None, kind: str | None = None) -> Program:
    """Programs of up to ``most`` nodes that fit together, the last one of an operation or with a kind of weight, if told."""
    inputs = tuple(draw(st.lists(_INPUTS, min_size=1, max_size=2)))
    batch, seed = draw(_BATCH), draw(st.integers(0, 9))
    leaf_inputs = draw(st.integers(0, 7)) == 7
    network = Network(inputs, batch, seed, leaf_inputs)
    for _ in range(most):
        _draw_node(draw, network)
        if draw(st.integers(0, 9)) == 0:
            break
    if operation or kind:
        for _ in range(8):
            if _draw_node(draw, network, operation, kind):
                break
        else:
            reject()
    ends = [k for k in range(len(inputs), len(network.values))] or _numbers(network, "any", None)
    if not ends:
        ends = [0]
    last = [ends[-1]] if draw(st.integers(0, 3)) else [ends[-1], draw(st.sampled_from(ends))]
    loss = Loss(
        draw(st.sampled_from(list(LOSSES))),
        *last,
        weighted=draw(st.integers(0, 5)) == 5,
        penalty=draw(st.integers(0, 9)) == 9,
    )
    functional = draw(st.integers(0, 9)) == 9
    return Program(inputs, tuple(network.nodes), loss, batch, seed, leaf_inputs, functional)


def _draw_node(draw, network: Network, only: str | None = None, kind: str | None = None) -> bool:
    """Add an operation to the network, ``only`` one or with a ``kind`` of weight, if one is drawn that goes with its values."""
    there = {wanted for wanted in _WANTED if _numbers(network, wanted, None)}
    names = [name for name in _DRAWN if only in (None, name) and there.issuperset(OPERATIONS[name].takes)]
    names = [name for name in names if kind is None or "w" in OPERATIONS[name].options]
    if not names:
        return False
    name = draw(st.sampled_from(names))
    operation = OPERATIONS[name]
    of: list[int] = []
    for wanted in operation.takes:
        of.append(draw(st.sampled_from(_numbers(network, wanted, of[0] if of else None))))
    strategies = operation.options | ({} if kind is None else {"w": weights_of(kind, 1)})
    options = {name: draw(strategy) for name, strategy in strategies.items()}
    call = draw(st.sampled_from(list(CALLS))) if draw(st.integers(0, 9)) == 9 else "plain"
    frozen = draw(st.sampled_from(["all", "first", "rest"])) if draw(st.integers(0, 9)) == 9 else ""
    try:
        network.add(Node(name, *of, call=call, frozen=frozen, **options), operation.make)
    except Unfit:
        return False
    return True
