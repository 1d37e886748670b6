"""The heart of a product: a few rows of inputs times a few rows of weights, whose sums stay in vector registers.

Each vector of weights is multiplied with all rows and each vector of inputs with all outputs once it is loaded. Sums
are added up in one order, whatever the sizes of a tile, so that a row has the same numbers whatever is beside it.

Weights are float32, or bfloat16 as uint16. With the latter, inputs are bfloat16, too, where the processor multiplies
pairs of them (AVX512_BF16), and float32 elsewhere, where weights are widened in registers.
"""

from __future__ import annotations

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

# what numba compiles for, which settings of its own may change
_FEATURES = cpu_target.target_context.codegen().magic_tuple()[2].split(',')
LANES = 16 if '+avx512f' in _FEATURES else 8 if '+avx' in _FEATURES else 4  # float32 numbers of a vector
# before 16, LLVM has another signature for it
HAS_DOT = {'+avx512bf16', '+avx512bw'} <= {*_FEATURES} and llvmlite.binding.llvm_version_info[0] >= 16
FETCHED = 8192  # bytes ahead of those that are read, so that the memory is busy where a row of weights ends

FLOAT, INT32, INT16, BYTE = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(8).as_pointer()


class BFloat(ir.Type):
    """What llvmlite has no name for."""

    intrinsic_name = 'bf16'

    def __str__(self) -> str:
        return 'bfloat'

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


@intrinsic
def in_kind_of(typing_context, x, array):
    """The float32 `x` as a number of the kind of an array: float32, or the bits of bfloat16."""

    def codegen(context, builder, signature, args):
        if signature.return_type == types.float32:
            return args[0]
        return builder.bitcast(builder.fptrunc(args[0], BFloat()), INT16)

    return array.dtype(x, array), codegen


def tile(rows: int, outputs: int):
    """A function that writes out[r : r + rows, o : o + outputs] of x Wᵀ.

    Its arguments are x `(·, n)`, W `(·, n)`, out, r and o, all rows one after another.
    """

    @intrinsic
    def write(typing_context, x, weight, out, r, o):
        def codegen(context, builder, signature, args):
            Tile(context, builder, signature, args, rows, outputs).write()
            return context.get_dummy_value()

        return types.void(x, weight, out, types.int64, types.int64), codegen

    return write


class Tile:
    """What LLVM is told of one."""

    def __init__(self, context, builder, signature, args, rows: int, outputs: int):
        self.context, self.builder, self.rows, self.outputs = context, builder, rows, outputs
        x, weight, out, first_row, self.first = args
        self.wide, self.dots = signature.args[1].dtype == types.float32, signature.args[0].dtype != types.float32
        self.lanes = 32 if self.dots else LANES  # numbers that are loaded at once
        self.sums_kind = ir.VectorType(FLOAT, LANES)
        self.weights, self.size = self._rows_of(signature.args[1], weight, self.first, outputs)
        self.inputs, _ = self._rows_of(signature.args[0], x, first_row, rows)
        self.outs, _ = self._rows_of(signature.args[2], out, first_row, rows)

    def _rows_of(self, kind, value, first, count: int):
        """Pointers to rows of an array, and how long they are."""
        builder, array = self.builder, self.context.make_array(kind)(self.context, self.builder, value)
        stride, begin = builder.extract_value(array.strides, 0), builder.bitcast(array.data, BYTE)
        element = FLOAT if kind.dtype == types.float32 else INT16
        rows = []
        for number in range(count):
            place = builder.mul(builder.add(first, ir.Constant(first.type, number)), stride)
            rows.append(builder.bitcast(builder.gep(begin, [place]), element.as_pointer()))
        return rows, builder.extract_value(array.shape, 1)

    def _call(self, name: str, result, *args):
        kind = ir.FunctionType(result, [it.type for it in args])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), args)

    def _load(self, row, at, mask):
        element, builder = row.type.pointee, self.builder
        kind, size = ir.VectorType(element, self.lanes), 4 if element == FLOAT else 2
        place = builder.bitcast(builder.gep(row, [at]), kind.as_pointer())
        if mask is None:
            return builder.load(place, align=size)
        name = f'llvm.masked.load.v{self.lanes}{"f32" if element == FLOAT else "i16"}.p0'
        return self._call(name, kind, place, ir.Constant(INT32, size), mask, ir.Constant(kind, None))

    def _fetch(self, row, at) -> None:
        ahead = ir.Constant(at.type, FETCHED // (4 if row.type.pointee == FLOAT else 2))
        place = self.builder.bitcast(self.builder.gep(row, [self.builder.add(at, ahead)]), BYTE)
        reads, second_level, data_cache = (ir.Constant(INT32, value) for value in (0, 2, 1))
        self._call('llvm.prefetch.p0', ir.VoidType(), place, reads, second_level, data_cache)

    def _widened(self, weights):
        """bfloat16 as float32: the upper half of its bits."""
        kind = ir.VectorType(INT32, self.lanes)
        bits = self.builder.shl(self.builder.zext(weights, kind), ir.Constant(kind, [16] * self.lanes))
        return self.builder.bitcast(bits, self.sums_kind)

    def _added(self, sums: list, at, mask=None) -> list:
        """The sums with the products at a place of all rows."""
        weights, inputs = ([self._load(row, at, mask) for row in rows] for rows in (self.weights, self.inputs))
        if mask is None:
            for row in self.weights:
                self._fetch(row, at)
        if self.dots:
            pairs = ir.VectorType(BFloat(), self.lanes)
            weights, inputs = ([self.builder.bitcast(it, pairs) for it in them] for them in (weights, inputs))
            name = 'llvm.x86.avx512bf16.dpbf16ps.512'
        else:
            weights = weights if self.wide else [self._widened(it) for it in weights]
            name = f'llvm.fmuladd.v{LANES}f32'
        added = []
        for x in inputs:
            for weight, total in zip(weights, sums[len(added) :]):
                args = (total, x, weight) if self.dots else (x, weight, total)
                added.append(self._call(name, self.sums_kind, *args))
        return added

    def write(self) -> None:
        builder, size = self.builder, self.size
        whole = builder.and_(size, ir.Constant(size.type, -self.lanes))
        entry = builder.block
        head, body, rest, tail, end = (
            builder.append_basic_block(name) for name in ('head', 'body', 'rest', 'tail', 'end')
        )
        builder.branch(head)

        builder.position_at_end(head)
        at, sums = builder.phi(size.type), [builder.phi(self.sums_kind) for _ in range(self.rows * self.outputs)]
        builder.cbranch(builder.icmp_signed('<', at, whole), body, rest)

        builder.position_at_end(body)
        added = self._added(sums, at)
        following = builder.add(at, ir.Constant(size.type, self.lanes))
        builder.branch(head)
        for phi, first, next_one in zip(
            (at, *sums),
            (ir.Constant(size.type, 0), *[ir.Constant(self.sums_kind, None)] * len(sums)),
            (following, *added),
        ):
            phi.add_incoming(first, entry)
            phi.add_incoming(next_one, body)

        builder.position_at_end(rest)
        builder.cbranch(builder.icmp_signed('<', whole, size), tail, end)

        builder.position_at_end(tail)
        last = self._added(sums, whole, self._first_lanes(builder.trunc(builder.sub(size, whole), INT32)))
        builder.branch(end)

        builder.position_at_end(end)
        totals = []
        for before, after in zip(sums, last):
            totals.append(builder.phi(self.sums_kind))
            totals[-1].add_incoming(before, rest)
            totals[-1].add_incoming(after, tail)
        for begin in range(0, len(totals), LANES):  # as many sums as one vector holds: some rows, or a part of one
            group = totals[begin : begin + LANES]
            total, stored = self._folded(group), min(self.outputs, len(group))
            for number in range(0, len(group), stored):
                row, output = divmod(begin + number, self.outputs)
                place = builder.gep(self.outs[row], [builder.add(self.first, ir.Constant(self.first.type, output))])
                place = builder.bitcast(place, ir.VectorType(FLOAT, stored).as_pointer())
                builder.store(self._shuffled(total, total, range(number, number + stored)), place, align=4)

    def _first_lanes(self, count):
        builder, kind = self.builder, ir.VectorType(INT32, self.lanes)
        filled = builder.insert_element(ir.Constant(kind, ir.Undefined), count, ir.Constant(INT32, 0))
        filled = self._shuffled(filled, filled, [0] * self.lanes)
        return builder.icmp_signed('<', ir.Constant(kind, list(range(self.lanes))), filled)

    def _shuffled(self, a, b, places):
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT32, len(places)), list(places)))

    def _folded(self, vectors: list):
        """The sums of the lanes of each of `LANES` vectors at most, as the first lanes of one.

        The upper half of each vector's lanes is added to the lower one, again and again. Two vectors share one then.
        """
        segment = LANES
        while segment > 1:
            half, folded = segment // 2, []
            for number in range(0, len(vectors), 2):
                a, b = vectors[number], vectors[min(number + 1, len(vectors) - 1)]
                both = a.type.count * (1 if a is b else 2)
                lower = [begin + i for begin in range(0, both, segment) for i in range(half)]
                upper = [it + half for it in lower]
                folded.append(self.builder.fadd(self._shuffled(a, b, lower), self._shuffled(a, b, upper)))
            vectors, segment = folded, half
        (total,) = vectors
        return total
