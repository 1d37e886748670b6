"""One token through a `Transformer` on a CPU, as one call that two threads or more share.

A token of a small batch needs about a thousand operators of a few microseconds, and the products among them read the
weights at a third of the memory's speed. Here numba compiles the whole token. Each thread of a `Crew` computes a share
of it, without the interpreter's lock, and `barrier` keeps them in step.

What the kernel computes is `Transformer.run` for one new token; its plain reference is that function. This file is
imported on first use, because numba takes a second; `audiolm/decode_step.py` has the Python side.
"""

from __future__ import annotations

import math
import weakref
from queue import SimpleQueue
from threading import Thread

import numpy as np
from llvmlite import ir
from numba import carray, njit, typeof, types
from numba.core import cgutils
from numba.extending import intrinsic

from musiclm_pytorch.kernels.tile import HAS_DOT, LANES, in_kind_of, tile
from musiclm_pytorch.locking import first_use

# Sums may be reordered, which vector instructions need; NaN and infinity keep their meaning.
MATHS = {'reassoc', 'contract', 'nsz', 'arcp'}
OPTIONS = dict(fastmath=MATHS, error_model='numpy', boundscheck=False)

# float32 numbers ahead of the one that is read, so that the memory is busy meanwhile
FETCHED = 2048
EPS = np.float32(1e-5)  # of layer norm

# columns of the table of addresses, a row a layer
SELF, CROSS, FEEDFORWARD = 0, 10, 20  # where each block begins
DYNAMIC, STATIC, SCALE, GAMMA, BETA = range(5)  # of each block
TO_Q, TO_OUT, KEYS, VALUES, TO_KV = range(5, 10)  # of attention
TO_HIDDEN, HIDDEN_GAMMA, HIDDEN_BETA, FROM_HIDDEN = range(5, 9)  # of feedforward
NUM_COLUMNS = 29

# places in the head of the job
(
    DIM,
    HEADS,
    DIM_HEAD,
    HIDDEN,
    STREAMS,
    LAYERS,
    ROWS,
    AT,
    WIDTH,
    AHEAD,
    MIXES_VALUES,
    CROSS_KEYS,
    BIAS,
    BIAS_WIDTH,
    MASK,
    CROSS_MASK,
    TABLE,
    RESIDUAL,
    SPARE,
    MIXING,
    INPUT,
    NORMED,
    QUERIES,
    KEY_VALUE,
    FIRST_VALUES,
    ATTENDED,
    OUTPUT,
    BOTH,
    GATED,
    SCORES,
    FINAL_GAMMA,
    FINAL_BETA,
    # the inputs of products, in the kind of numbers that they read; in float32 the same places as above
    READ_INPUT,
    READ_NORMED,
    READ_ATTENDED,
    READ_GATED,
    NUM_FIELDS,
) = range(37)

# What the threads of a crew share: how many they are; how often one has come to a barrier; how many jobs there have
# been, and which is at hand; whether one is about to come, or none any more; and for each thread whether it sleeps.
THREADS, ARRIVALS, ISSUED, KIND, ADDRESS, HELD, STOPPED, ASLEEP = range(8)
TOKEN, LINEAR = range(2)  # kinds of jobs

SPINS = (
    20_000  # looks at what other threads do before the processor is left to others, some hundredths of a millisecond
)
PATIENCE = SPINS + 5000  # looks for a job before a thread sleeps, some milliseconds where nobody else runs
leave_processor = types.ExternalFunction('sched_yield', types.int32())


@intrinsic
def count(typing_context, array, index, by):
    """Add to `array[index]`, seen by all threads; gives what was there before."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw('add', builder.gep(data, [args[1]]), args[2], 'seq_cst')

    return types.int64(array, types.int64, types.int64), codegen


@intrinsic
def look(typing_context, array, index):
    """`array[index]` as other threads have left it."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.load_atomic(builder.gep(data, [args[1]]), 'seq_cst', 8)

    return types.int64(array, types.int64), codegen


@njit(**OPTIONS)
def barrier(crew):
    """Wait until all threads have come here as often as this one."""
    due = (count(crew, ARRIVALS, 1) // crew[THREADS] + 1) * crew[THREADS]
    looks = 0
    while look(crew, ARRIVALS) < due:
        looks += 1
        if looks > SPINS:
            leave_processor()


def _cast(context, builder, signature, args):
    return builder.inttoptr(args[0], context.get_value_type(signature.return_type))


@intrinsic
def pointer_to(typing_context, address):
    """An address as a pointer to float32."""
    return types.CPointer(types.float32)(types.int64), _cast


@intrinsic
def pointer_to_addresses(typing_context, address):
    """An address as a pointer to int64."""
    return types.CPointer(types.int64)(types.int64), _cast


@intrinsic
def pointer_like(typing_context, address, like):
    """An address as a pointer to numbers of the kind of an array."""
    return types.CPointer(like.dtype)(types.int64, like), _cast


@intrinsic
def prefetch(typing_context, array, index):
    """Ask for the cache line of `array.flat[index]`, which may lie behind its end, into the second level."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        byte = ir.IntType(8).as_pointer()
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, 'llvm.prefetch.p0')
        reads, second_level, data_cache = (ir.Constant(number, value) for value in (0, 2, 1))
        address = builder.bitcast(builder.gep(data, [args[1]]), byte)
        builder.call(function, [address, reads, second_level, data_cache])
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


@njit(**OPTIONS)
def matrix(address, rows, columns):
    return carray(pointer_to(address), (rows, columns))


@njit(**OPTIONS)
def vector(address, size):
    return carray(pointer_to(address), (size,))


@njit(**OPTIONS)
def matrix_like(address, rows, columns, like):
    return carray(pointer_like(address, like), (rows, columns))


@njit(**OPTIONS)
def read_as(x, out):
    """x in the kind of numbers of `out`, which is x itself where they are the same."""
    for i in range(out.size):
        out[i] = in_kind_of(x[i], out)


one_by_one, four_by_one, one_by_eight = tile(1, 1), tile(4, 1), tile(1, 8)
four_by_two, four_by_four = tile(4, 2), tile(4, 4)


@njit(**OPTIONS)
def product(x, weight, out, first, last):
    """out[:, first:last] = x @ weight[first:last].T, reading the weights once, from their begin to their end."""
    rows = len(x)
    for o in range(first, last, 8):
        is_whole, r = o + 8 <= last, 0
        while r < rows:
            # two or three rows are faster one by one: the memory brings the next weights meanwhile
            is_four = r + 4 <= rows
            if not is_whole:
                for each in range(o, last):
                    if is_four:
                        four_by_one(x, weight, out, r, each)
                    else:
                        one_by_one(x, weight, out, r, each)
            elif not is_four:
                one_by_eight(x, weight, out, r, o)
            elif LANES == 8:  # of AVX2, which has 16 registers
                for each in range(o, o + 8, 2):
                    four_by_two(x, weight, out, r, each)
            else:
                four_by_four(x, weight, out, r, o)
                four_by_four(x, weight, out, r, o + 4)
            r += 4 if is_four else 1


@njit(**OPTIONS)
def exponential(x):
    """e to the x for x ≤ 0 in float32, to 2 units in the last place; in a form that becomes vector instructions."""
    if x < np.float32(-87):
        x = np.float32(-87)
    power = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    # x − power · ln 2, the logarithm in two parts, the first of few enough bits to be multiplied exactly
    x = x - power * np.float32(0.693145751953125)
    x = x - power * np.float32(1.4286068203094173e-06)
    series = np.float32(1 / 5040)
    series = series * x + np.float32(1 / 720)
    series = series * x + np.float32(1 / 120)
    series = series * x + np.float32(1 / 24)
    series = series * x + np.float32(1 / 6)
    series = series * x + np.float32(0.5)
    series = series * x + np.float32(1)
    series = series * x + np.float32(1)
    return series * np.int32((np.int32(power) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(**OPTIONS)
def gelu(x):
    """x Φ(x), the error function by 7.1.26 of Abramowitz and Stegun's handbook (to 1.5e-7)."""
    z = abs(x) * np.float32(0.7071067811865476)
    t = np.float32(1) / (np.float32(1) + np.float32(0.3275911) * z)
    series = np.float32(1.061405429)
    series = series * t + np.float32(-1.453152027)
    series = series * t + np.float32(1.421413741)
    series = series * t + np.float32(-0.284496736)
    series = series * t + np.float32(0.254829592)
    tail = np.float32(0.5) * series * t * exponential(-z * z)  # of the normal distribution, beyond |x|
    if x > 0:
        tail = np.float32(1) - tail
    return x * tail


@njit(**OPTIONS)
def layer_norm(x, gamma, beta, out, size):
    mean = np.float32(0)
    for i in range(size):
        mean += x[i]
    mean /= np.float32(size)
    variance = np.float32(0)
    for i in range(size):
        variance += (x[i] - mean) * (x[i] - mean)
    scale = np.float32(1) / np.float32(math.sqrt(variance / np.float32(size) + EPS))
    for i in range(size):
        out[i] = (x[i] - mean) * scale * gamma[i] + beta[i]


@njit(**OPTIONS)
def width_connection(streams, columns, mixing, x):
    """What a branch takes of the residual streams (s, d), into `x`; `mixing` keeps the weights for the way back."""
    num_streams, dim = streams.shape
    if num_streams == 1:
        for i in range(dim):
            x[i] = streams[0, i]
        return
    dynamic = matrix(columns[DYNAMIC], num_streams + 2, dim)
    static = matrix(columns[STATIC], num_streams, num_streams + 2)
    scale = vector(columns[SCALE], num_streams + 2)
    for i in range(dim):
        x[i] = 0
    for s in range(num_streams):
        stream = streams[s]
        square = np.float32(0)
        for i in range(dim):
            square += stream[i] * stream[i]
        norm = max(np.float32(math.sqrt(square)), np.float32(1e-12))
        for j in range(num_streams + 2):
            weights = dynamic[j]
            total = np.float32(0)
            for i in range(dim):
                total += weights[i] * stream[i]
            mixing[s, j] = static[s, j] + np.float32(math.tanh(total / norm)) * scale[j]
        share = mixing[s, 0]
        for i in range(dim):
            x[i] += share * stream[i]


@njit(**OPTIONS)
def depth_connection(streams, mixing, spare, output):
    """Mix the residual streams, and add what a branch gives."""
    num_streams, dim = streams.shape
    if num_streams == 1:
        for i in range(dim):
            streams[0, i] += output[i]
        return
    for to in range(num_streams):
        mixed, share = spare[to], mixing[to, num_streams + 1]
        for i in range(dim):
            mixed[i] = share * output[i]
        for s in range(num_streams):
            stream, share = streams[s], mixing[s, 1 + to]
            for i in range(dim):
                mixed[i] += share * stream[i]
    for s in range(num_streams):
        for i in range(dim):
            streams[s, i] = spare[s, i]


@njit(**OPTIONS | dict(fastmath=MATHS | {'nnan'}))  # only so does a comparison become vector instructions
def largest(x, size):
    found = x[0]
    for i in range(size):
        if x[i] > found:
            found = x[i]
    return found


@njit(**OPTIONS)
def softmax(scores, scale, bias, mask, ahead, num_keys):
    """In place, of `num_keys` scores, scaled, with their mask (n) added, and the bias of those behind `ahead` ones."""
    for i in range(num_keys):
        scores[i] = scores[i] * scale + mask[i]
    for i in range(ahead, num_keys):
        scores[i] += bias[i - ahead]
    highest = largest(scores, num_keys)
    total = np.float32(0)
    for i in range(num_keys):
        weight = exponential(scores[i] - highest)
        scores[i] = weight
        total += weight
    share = np.float32(1) / total
    for i in range(num_keys):
        scores[i] *= share


@njit(**OPTIONS)
def weighted_sum(weights, v, num_keys, out):
    """out (h, d) = weights (h, n) @ v (n, d), reading v once."""
    heads, dim_head = out.shape
    for head in range(heads):
        for d in range(dim_head):
            out[head, d] = 0
    i = 0
    while i + 4 <= num_keys:
        v0, v1, v2, v3 = v[i], v[i + 1], v[i + 2], v[i + 3]
        for d in range(0, 4 * dim_head, 16):
            prefetch(v, i * dim_head + d + FETCHED)
        for head in range(heads):
            own, weight = out[head], weights[head]
            w0, w1, w2, w3 = weight[i], weight[i + 1], weight[i + 2], weight[i + 3]
            for d in range(dim_head):
                own[d] += w0 * v0[d] + w1 * v1[d] + w2 * v2[d] + w3 * v3[d]
        i += 4
    while i < num_keys:
        for head in range(heads):
            for d in range(dim_head):
                out[head, d] += weights[head, i] * v[i, d]
        i += 1


@njit(**OPTIONS)
def attend(q, k, v, bias, mask, scores, ahead, num_keys, out):
    """Some heads of a row: q and out (h · d), k and v (n, d), bias (h, n), mask (n), `scores` (h, n) is spare."""
    dim_head, heads = k.shape[1], q.size // k.shape[1]
    scale = np.float32(1) / np.float32(math.sqrt(np.float32(dim_head)))
    product(q.reshape(heads, dim_head), k, scores, 0, num_keys)
    for head in range(heads):
        softmax(scores[head], scale, bias[head], mask, ahead, num_keys)
    weighted_sum(scores, v, num_keys, out.reshape(heads, dim_head))


@njit(**OPTIONS)
def share_of(size, thread, threads):
    return size * thread // threads, size * (thread + 1) // threads


@njit(**OPTIONS)
def token(job, crew, thread, weight, read):
    threads = crew[THREADS]
    dim, heads, dim_head, hidden = job[DIM], job[HEADS], job[DIM_HEAD], job[HIDDEN]
    num_streams, rows, at, width = job[STREAMS], job[ROWS], job[AT], job[WIDTH]
    inner, num_keys, num_cross_keys = heads * dim_head, job[AT] + 1, job[CROSS_KEYS]

    residual = carray(pointer_to(job[RESIDUAL]), (rows, num_streams, dim))
    spare = carray(pointer_to(job[SPARE]), (rows, num_streams, dim))
    mixing = carray(pointer_to(job[MIXING]), (rows, num_streams, num_streams + 2))
    x, normed = matrix(job[INPUT], rows, dim), matrix(job[NORMED], rows, dim)
    queries, attended = matrix(job[QUERIES], rows, inner), matrix(job[ATTENDED], rows, inner)
    key_value, first_values = matrix(job[KEY_VALUE], rows, 2 * dim_head), matrix(job[FIRST_VALUES], rows, dim_head)
    output, both = matrix(job[OUTPUT], rows, dim), matrix(job[BOTH], rows, 2 * hidden)
    gated = matrix(job[GATED], rows, hidden)
    read_x, read_normed = matrix_like(job[READ_INPUT], rows, dim, read), matrix_like(job[READ_NORMED], rows, dim, read)
    read_attended = matrix_like(job[READ_ATTENDED], rows, inner, read)
    read_gated = matrix_like(job[READ_GATED], rows, hidden, read)
    scores = carray(pointer_to(job[SCORES]), (threads, heads, max(width, num_cross_keys)))[thread]
    bias, cross_mask = matrix(job[BIAS], heads, job[BIAS_WIDTH]), matrix(job[CROSS_MASK], rows, num_cross_keys)
    mask = matrix(job[MASK], rows, width)
    table = carray(pointer_to_addresses(job[TABLE]), (job[LAYERS], NUM_COLUMNS))

    first_row, last_row = share_of(rows, thread, threads)
    first_head, last_head = share_of(rows * heads, thread, threads)
    first_q, last_q = share_of(inner, thread, threads)
    first_kv, last_kv = share_of(2 * dim_head, thread, threads)
    first_out, last_out = share_of(dim, thread, threads)
    first_hidden, last_hidden = share_of(hidden, thread, threads)

    for layer in range(job[LAYERS]):
        # self-attention
        columns = table[layer, SELF:CROSS]
        for row in range(first_row, last_row):
            if layer > 0:
                depth_connection(residual[row], mixing[row], spare[row], output[row])
            width_connection(residual[row], columns, mixing[row], x[row])
            layer_norm(x[row], vector(columns[GAMMA], dim), vector(columns[BETA], dim), normed[row], dim)
            read_as(normed[row], read_normed[row])
            read_as(x[row], read_x[row])
        barrier(crew)
        product(read_normed, matrix_like(columns[TO_Q], inner, dim, weight), queries, first_q, last_q)
        product(read_x, matrix_like(columns[TO_KV], 2 * dim_head, dim, weight), key_value, first_kv, last_kv)
        barrier(crew)
        k = carray(pointer_to(columns[KEYS]), (rows, width, dim_head))
        v = carray(pointer_to(columns[VALUES]), (rows, width, dim_head))
        for row in range(first_head // heads, (last_head + heads - 1) // heads):
            # two threads that share a row both write it, the same numbers
            for d in range(dim_head):
                value = key_value[row, dim_head + d]
                if layer == 0:
                    first_values[row, d] = value
                elif job[MIXES_VALUES]:
                    value = np.float32(0.5) * (value + first_values[row, d])
                k[row, at, d] = key_value[row, d]
                v[row, at, d] = value
            start, stop = max(first_head - row * heads, 0), min(last_head - row * heads, heads)
            own = slice(start * dim_head, stop * dim_head)
            attend(
                queries[row, own],
                k[row],
                v[row],
                bias[start:stop],
                mask[row],
                scores,
                job[AHEAD],
                num_keys,
                attended[row, own],
            )
            read_as(attended[row, own], read_attended[row, own])
        barrier(crew)
        product(read_attended, matrix_like(columns[TO_OUT], dim, inner, weight), output, first_out, last_out)
        barrier(crew)

        # cross-attention
        if num_cross_keys > 0:
            columns = table[layer, CROSS:FEEDFORWARD]
            for row in range(first_row, last_row):
                depth_connection(residual[row], mixing[row], spare[row], output[row])
                width_connection(residual[row], columns, mixing[row], x[row])
                layer_norm(x[row], vector(columns[GAMMA], dim), vector(columns[BETA], dim), normed[row], dim)
                read_as(normed[row], read_normed[row])
            barrier(crew)
            product(read_normed, matrix_like(columns[TO_Q], inner, dim, weight), queries, first_q, last_q)
            barrier(crew)
            k = carray(pointer_to(columns[KEYS]), (rows, num_cross_keys, dim_head))
            v = carray(pointer_to(columns[VALUES]), (rows, num_cross_keys, dim_head))
            for row in range(first_head // heads, (last_head + heads - 1) // heads):
                start, stop = max(first_head - row * heads, 0), min(last_head - row * heads, heads)
                own = slice(start * dim_head, stop * dim_head)
                attend(
                    queries[row, own],
                    k[row],
                    v[row],
                    bias[start:stop],
                    cross_mask[row],
                    scores,
                    num_cross_keys,
                    num_cross_keys,
                    attended[row, own],
                )
                read_as(attended[row, own], read_attended[row, own])
            barrier(crew)
            product(read_attended, matrix_like(columns[TO_OUT], dim, inner, weight), output, first_out, last_out)
            barrier(crew)

        # feedforward
        columns = table[layer, FEEDFORWARD:]
        for row in range(first_row, last_row):
            depth_connection(residual[row], mixing[row], spare[row], output[row])
            width_connection(residual[row], columns, mixing[row], x[row])
            layer_norm(x[row], vector(columns[GAMMA], dim), vector(columns[BETA], dim), normed[row], dim)
            read_as(normed[row], read_normed[row])
        barrier(crew)
        to_hidden = matrix_like(columns[TO_HIDDEN], 2 * hidden, dim, weight)
        product(read_normed, to_hidden, both, first_hidden, last_hidden)
        product(read_normed, to_hidden, both, hidden + first_hidden, hidden + last_hidden)
        for row in range(rows):
            own, gate, result = both[row, :hidden], both[row, hidden:], gated[row]
            for i in range(first_hidden, last_hidden):
                result[i] = gelu(gate[i]) * own[i]
        barrier(crew)
        gamma, beta = vector(columns[HIDDEN_GAMMA], hidden), vector(columns[HIDDEN_BETA], hidden)
        for row in range(first_row, last_row):
            layer_norm(gated[row], gamma, beta, gated[row], hidden)
            read_as(gated[row], read_gated[row])
        barrier(crew)
        product(read_gated, matrix_like(columns[FROM_HIDDEN], dim, hidden, weight), output, first_out, last_out)
        barrier(crew)

    gamma, beta = vector(job[FINAL_GAMMA], dim), vector(job[FINAL_BETA], dim)
    for row in range(first_row, last_row):
        depth_connection(residual[row], mixing[row], spare[row], output[row])
        for i in range(dim):
            x[row, i] = residual[row, 0, i]
        for s in range(1, num_streams):
            for i in range(dim):
                x[row, i] += residual[row, s, i]
        layer_norm(x[row], gamma, beta, output[row], dim)


@njit(**OPTIONS)
def linear(job, crew, thread, weight, read):
    rows, size, num_out = job[0], job[1], job[2]
    first, last = share_of(num_out, thread, crew[THREADS])
    x, weights = matrix_like(job[3], rows, size, read), matrix_like(job[4], num_out, size, weight)
    product(x, weights, matrix(job[5], rows, num_out), first, last)


def compiled(function):
    """As a function that Python may call, without its lock; kept for later where there is a place to keep it."""
    try:
        return njit(nogil=True, cache=True, **OPTIONS)(function)
    except RuntimeError:  # neither the folder of this file nor the user's can be written
        return njit(nogil=True, **OPTIONS)(function)


@compiled
def work(crew, thread, done, weight, read):
    """Compute shares of jobs: of the one at hand, if this is thread 0, or of all that come, until none has for a while.

    done: how many jobs this thread has worked on; returns how many it has now.
    weight, read: arrays of the kinds of numbers that weights have, and that products read beside them.
    """
    if thread == 0:
        count(crew, ISSUED, 1)
    elif look(crew, ASLEEP + thread) != 0:
        count(crew, ASLEEP + thread, -1)
    looks = 0
    while True:
        if thread != 0 and look(crew, ISSUED) == done:
            looks += 1
            if looks > SPINS:
                leave_processor()
            if look(crew, STOPPED) != 0:
                return done
            if looks > PATIENCE and look(crew, HELD) == 0:
                count(crew, ASLEEP + thread, 1)
                # whoever is about to issue a job holds first, and looks for sleepers then
                if look(crew, HELD) == 0:
                    return done
                count(crew, ASLEEP + thread, -1)
            continue
        if crew[KIND] == TOKEN:
            token(carray(pointer_to_addresses(crew[ADDRESS]), (NUM_FIELDS,)), crew, thread, weight, read)
        else:
            linear(carray(pointer_to_addresses(crew[ADDRESS]), (6,)), crew, thread, weight, read)
        barrier(crew)
        done, looks = done + 1, 0
        if thread == 0:
            return done


@compiled
def hold(crew):
    """Let no thread fall asleep until `HELD` is 0 again."""
    count(crew, HELD, 1)


def inputs_of(weights: str) -> str:
    """The kind of numbers that products with such weights read beside them."""
    return 'bfloat16' if weights == 'bfloat16' and HAS_DOT else 'float32'


class Crew:
    """The calling thread and those that it shares jobs with; these sleep where there are none, and end with it."""

    def __init__(self, threads: int, weights: str):
        """weights: the kind of numbers that they have, 'float32' or 'bfloat16'."""
        kinds = [np.float32 if it == 'float32' else np.uint16 for it in (weights, inputs_of(weights))]
        self.kinds = tuple(np.empty(0, it) for it in kinds)
        self.shared = np.zeros(ASLEEP + threads, dtype=np.int64)
        self.shared[THREADS] = threads
        with first_use(('step_kernel', weights)):
            hold.compile((typeof(self.shared),))
            work.compile(tuple(map(typeof, (self.shared, 0, 0, *self.kinds))))  # of these kinds alone
        self.queues = [SimpleQueue() for _ in range(threads - 1)]
        for number, queue in enumerate(self.queues, start=1):
            Thread(target=self._serve, args=(self.shared, number, queue, self.kinds), daemon=True).start()
        weakref.finalize(self, self._dismiss, self.shared, self.queues)

    def run(self, kind: int, job: np.ndarray) -> None:
        """Compute a job; returns when all threads are through with it."""
        shared = self.shared
        shared[KIND], shared[ADDRESS] = kind, job.ctypes.data
        try:
            hold(shared)
            for number, queue in enumerate(self.queues, start=1):
                if shared[ASLEEP + number]:
                    queue.put(None)
            # one call, for no signal may come between a job and the share of this thread, on which others wait
            work(shared, 0, 0, *self.kinds)
        finally:
            shared[HELD] = 0

    @staticmethod
    def _serve(shared: np.ndarray, number: int, queue: SimpleQueue, kinds: tuple) -> None:
        done = 0
        while not shared[STOPPED]:
            done = work(shared, number, done, *kinds)
            queue.get()

    @staticmethod
    def _dismiss(shared: np.ndarray, queues: list[SimpleQueue]) -> None:
        shared[STOPPED] = 1
        for queue in queues:
            queue.put(None)
