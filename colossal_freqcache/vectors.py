"""What numba has no words for: vectors of a row's elements, reading ahead, and the bits of a float.

LLVM turns a loop over a row's elements into vectors only behind a check that no two arrays overlap, at every row: for
rows of 128 bytes the check costs as much as the row. Here a row is handled 64 bytes at a time, then 16, then element by
element, with the same operations in the same order at every element: one rounding each, so the bits are those of the
plain loop. They are intrinsics, since a call of a jitted function counts a reference to each array up and down.

The width of a row is what `row_width` gives. Arrays are C-contiguous; `to` and `at` are flat places in them. A caller
that is cached on disk is compiled anew only when its own file changes, not when this one does. Measured:
docs/measured_facts.md.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = [
    "add_row",
    "add_scaled_row",
    "bits_of_float",
    "copy_row",
    "float_of_bits",
    "prefetch",
    "prefetch_row",
    "row_width",
    "scale_row",
    "subtract_scaled_row",
]

LINE, QUARTER = 64, 16  # bytes
UNROLLED = 512  # bytes of the widest row that is handled without a loop
_INT64 = ir.IntType(64)


def _check_contiguous(*arrays) -> None:
    for array in arrays:
        if not isinstance(array, types.Array) or array.layout != "C":
            raise TypeError(f"a C-contiguous array is needed, not {array}")


def _data(context, builder, array_type, array):
    return context.make_array(array_type)(context, builder, array).data


def _pointer(builder, data, index, to):
    return builder.bitcast(builder.gep(data, [index]), to.as_pointer())


# ---- reading ahead --------------------------------------------------------------------------------------------------


def _emit_prefetch(builder, data, index) -> None:
    byte, i32 = ir.IntType(8), ir.IntType(32)
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [byte.as_pointer(), i32, i32, i32]), "llvm.prefetch.p0i8"
    )
    to_read, every_level, is_data = i32(0), i32(3), i32(1)
    builder.call(function, [_pointer(builder, data, index, byte), to_read, every_level, is_data])


@intrinsic
def prefetch(typing_context, array, index):
    """Asks for the cache line of the element at `index` early, so that reads at random places overlap.

    Any index does: one out of bounds is only useless.
    """
    _check_contiguous(array)

    def generate(context, builder, signature, arguments):
        array, index = arguments
        _emit_prefetch(builder, _data(context, builder, signature.args[0], array), index)
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


@intrinsic
def prefetch_row(typing_context, array, at, width):
    """The lines of a row that starts at a flat place."""
    _check_contiguous(array)

    def generate(context, builder, signature, arguments):
        array, at, width = arguments
        data = _data(context, builder, signature.args[0], array)
        element_bits = signature.args[0].dtype.bitwidth
        lanes = LINE * 8 // element_bits

        def emit(offset) -> None:
            _emit_prefetch(builder, data, builder.add(at, offset))

        if isinstance(signature.args[2], types.UniTuple):
            for first in range(0, signature.args[2].count * QUARTER * 8 // element_bits, lanes):
                emit(_INT64(first))
        else:
            count = builder.udiv(builder.add(width, _INT64(lanes - 1)), _INT64(lanes))
            with cgutils.for_range(builder, count, intp=_INT64) as loop:
                emit(builder.mul(loop.index, _INT64(lanes)))
        return context.get_dummy_value()

    return types.void(array, types.int64, _width_type(width)), generate


def _width_type(width):
    return width if isinstance(width, types.UniTuple) else types.int64


# ---- rows -----------------------------------------------------------------------------------------------------------


def row_width(num_elements: int, itemsize: int) -> int | tuple[int, ...]:
    """What a kernel gets as the width of a row: the elements; or a tuple with an entry for each 16 bytes of it.

    The length of a tuple is part of its type, so that a kernel is compiled for it, without a loop over the row. Up to
    512 bytes.
    """
    num_bytes = num_elements * itemsize
    return num_elements if num_bytes % QUARTER or num_bytes > UNROLLED else (0,) * (num_bytes // QUARTER)


def _row_operation(formula: str, has_factor: bool):
    """An intrinsic that does `formula` to a row. has_factor: it takes w, a number, at the end."""

    def combined(builder, old, new, factor):
        if has_factor:
            new = builder.fmul(factor, new)
        return {"=": lambda: new, "+=": lambda: builder.fadd(old(), new), "-=": lambda: builder.fsub(old(), new)}[
            formula.split()[1]
        ]()

    def generate(context, builder, signature, arguments):
        target, to, source, at, width, *factor = arguments
        target = _data(context, builder, signature.args[0], target)
        source = _data(context, builder, signature.args[2], source)
        element_bits = signature.args[0].dtype.bitwidth

        def operate(lanes: int, place) -> None:
            vector = ir.VectorType(target.type.pointee, lanes)
            align = element_bits // 8
            spread = None
            if has_factor:
                one = builder.insert_element(ir.Constant(vector, ir.Undefined), factor[0], ir.IntType(32)(0))
                spread = builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), lanes), None))
            new = builder.load(_pointer(builder, source, builder.add(at, place), vector), align=align)
            goal = _pointer(builder, target, builder.add(to, place), vector)
            builder.store(combined(builder, lambda: builder.load(goal, align=align), new, spread), goal, align=align)

        steps = [num_bytes * 8 // element_bits for num_bytes in (LINE, QUARTER, element_bits // 8)]
        if isinstance(signature.args[4], types.UniTuple):
            size, place = signature.args[4].count * steps[1], 0
            while place < size:
                lanes = steps[0] if size - place >= steps[0] else steps[1]
                operate(lanes, _INT64(place))
                place += lanes
        else:
            done = _INT64(0)
            for lanes in steps:
                count = builder.udiv(builder.sub(width, done), _INT64(lanes))
                with cgutils.for_range(builder, count, intp=_INT64) as loop:
                    operate(lanes, builder.add(done, builder.mul(loop.index, _INT64(lanes))))
                done = builder.add(done, builder.mul(count, _INT64(lanes)))
        return context.get_dummy_value()

    def signature_of(target, source, width, *factor):
        _check_contiguous(target, source)
        if target.dtype != source.dtype:
            raise TypeError(f"rows of one dtype are needed, not {target.dtype} and {source.dtype}")
        return types.void(target, types.int64, source, types.int64, _width_type(width), *factor), generate

    if has_factor:

        @intrinsic
        def operation(typing_context, target, to, source, at, width, w):
            return signature_of(target, source, width, target.dtype)

    else:

        @intrinsic
        def operation(typing_context, target, to, source, at, width):
            return signature_of(target, source, width)

    return operation


copy_row = _row_operation("target = source", False)
add_row = _row_operation("target += source", False)
scale_row = _row_operation("target = w * source", True)
add_scaled_row = _row_operation("target += w * source", True)
subtract_scaled_row = _row_operation("target -= w * source", True)


# ---- bits -----------------------------------------------------------------------------------------------------------


@intrinsic
def bits_of_float(typing_context, value):
    """uint32: the bits of a float32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def float_of_bits(typing_context, bits):
    """float32 with these bits, a uint32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate
