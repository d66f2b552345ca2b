"""The values of an expert in an aggregator's memory: its weights, and what its server optimizer remembers."""

from fedmoe.protocol.fold import Values
from fedmoe.protocol.layout import AdapterBuffer, Layout
from fedmoe.protocol.rules import AggregationRules
from fedmoe.protocol.server import first_value, has_state


class Held:
    """Weights and server state of one version, in two buffers of the same layout.

    Under `sgd` the server state is never touched, and so takes no memory.

    Args:
        layout: of the expert.

    Attributes:
        optimizer: the server optimizer to which the state belongs; "" if there is no state.
    """

    def __init__(self, layout: Layout) -> None:
        self.weights = AdapterBuffer(layout)
        self.state = AdapterBuffer(layout)
        self.optimizer = ""

    @property
    def values(self) -> Values:
        """Both, (numel,) fp32; the state has a meaning only if `optimizer` is not empty."""
        return Values(self.weights.flat, self.state.flat)

    @property
    def state_file(self) -> memoryview | None:
        """The state as a safetensors file, None if there is none."""
        return self.state.file if self.optimizer else None

    def load(self, weights: bytes, state: bytes | None, optimizer: str) -> None:
        """Copy what Redis holds; `state` is None, and `optimizer` "", if there is no state.

        Raises:
            SpecError: if a layout differs.
        """
        self.weights.load(weights)
        if state is not None:
            self.state.load(state)
        self.optimizer = optimizer

    def copy(self) -> "Held":
        """The same values in buffers of their own."""
        copy = Held(self.weights.layout)
        copy.take(self)
        return copy

    def take(self, other: "Held") -> None:
        """Copy the values of another one of this layout."""
        self.weights.flat.copy_(other.weights.flat)
        if other.optimizer:
            self.state.flat.copy_(other.state.flat)
        self.optimizer = other.optimizer

    def stamp(self, commit: str) -> None:
        """Write the commit id of these weights into the headers of both files."""
        self.weights.stamp(commit)
        if self.optimizer:
            self.state.stamp(commit)

    def lacks_state(self, rules: AggregationRules) -> bool:
        """True if the server optimizer in force needs a state that is not here."""
        return has_state(rules) and self.optimizer != rules.server_optimizer

    def next_values(self, out: "Held", rules: AggregationRules) -> Values:
        """The values from which the next fold into `out` starts: these, or weights with a state that begins now."""
        if not self.lacks_state(rules):
            return self.values
        out.state.flat.fill_(first_value(rules))
        return Values(self.weights.flat, out.state.flat)
