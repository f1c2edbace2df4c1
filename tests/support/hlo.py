"""What a compiled program holds and sends, read from its HLO."""

import math
import os
import re
from dataclasses import dataclass

import jax

# The tests' own way to fuse, where XLA has two, in place of the users' that conftest compiles by. It takes a third of
# the time, and the collectives and buffers of a step are the same to some percent.
_FUSIONS = "xla_cpu_use_fusion_emitters"
_QUICKLY = {_FUSIONS: False} if _FUSIONS in os.environ["XLA_FLAGS"] else {}
_COLLECTIVE = re.compile(r" = (.*?) (all-to-all|all-gather|reduce-scatter|all-reduce|collective-permute)(?:-start)?\(")
_ARRAY = re.compile(r"\b[a-z]+(\d+)\[([\d,]*)\]")


@dataclass(frozen=True)
class Collective:
    """A collective of a program: its kind, and its line of HLO."""

    kind: str
    line: str

    @property
    def arrays(self):
        """The arrays that it gives a device, as (bits of a number, shape)."""
        return arrays(_COLLECTIVE.search(self.line)[1])

    @property
    def numbers(self):
        return sum(math.prod(shape) for _, shape in self.arrays)

    @property
    def bytes(self):
        return sum(bits // 8 * math.prod(shape) for bits, shape in self.arrays)

    @property
    def devices(self):
        """How many devices take part together.

        XLA writes their groups out, or as a shape of all devices, or as the axes of a mesh.
        """
        if groups := re.search(r"replica_groups=\{\{([\d,]+)\}", self.line):
            return groups[1].count(",") + 1
        if groups := re.search(r"replica_groups=\[\d+,(\d+)\]<=", self.line):
            return int(groups[1])
        mesh, axes = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", self.line).groups()
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", axes))


def compiled(function, *args):
    """Compile a jitted function quickly, to see what it sends and holds."""
    return function.lower(*args).compile(_QUICKLY)


def compiled_as_for_users(function, *args, donate=()):
    """Compile a function with the fusions that users have."""
    return jax.jit(function, donate_argnums=donate).lower(*args).compile()


def arrays(text):
    """The arrays in a piece of HLO, as (bits of a number, shape)."""
    return [(int(bits), tuple(int(n) for n in shape.split(",") if n)) for bits, shape in _ARRAY.findall(text)]


def collectives(compiled, usual=True):
    """The collectives of a compiled program; unless `usual` is False, those in rarely taken branches are left out.

    All conditions of the exchange ask for the rare case, so that the usual path is the branch of false, the first one.
    """
    bodies, name, entry = {}, "", ""
    for line in compiled.as_text().splitlines():
        if opening := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = opening[2]
            entry = name if opening[1] else entry
            bodies[name] = []
        elif line.startswith(" "):
            bodies[name].append(line)

    def walk(name):
        for line in bodies[name]:
            if found := _COLLECTIVE.search(line):
                yield Collective(found[2], line)
            if " conditional(" in line:
                branches = re.search(r"branch_computations=\{([^}]*)\}", line)
                called = branches[1].replace("%", "").split(", ") if branches else _called("false|true", line)
                called = called[:1] if usual else called
            else:
                called = _called("calls|to_apply|body|condition", line)
            for inner in called:
                yield from walk(inner)

    return list(walk(entry))


def _called(attributes, line):
    return re.findall(rf"(?:{attributes})(?:_computation)?=%?([\w.\-]+)", line)
