"""Chips, roofline, what the compiler's errors say, and the search for the largest batch."""

import pytest

from jaxpeft.errors import InputError
from jaxpeft.preflight.chips import CHIPS, GIBIBYTE, parse_topology
from jaxpeft.preflight.compiled import Shortage, read_shortage
from jaxpeft.preflight.largest_batch import QUANTUM, Attempt, largest_batch
from jaxpeft.preflight.roofline import roofline


def test_topologies_from_one_chip_to_256():
    sizes = {parse_topology(f"{chip.name}:{shape}").num_chips for chip in CHIPS.values() for shape in chip.shapes}
    assert sizes == {1, 4, 8, 16, 32, 64, 128, 256}


@pytest.mark.parametrize(
    ("name", "way_out"), [("v5x:2x4", "v5e, v5p, v6e"), ("v5e:3x3", "1x1, 2x2, 2x4"), ("v5p", "2x2x1"), ("", "v5e:2x4")]
)
def test_a_topology_that_does_not_exist(name, way_out):
    with pytest.raises(InputError, match=f"topology '{name}'.*{way_out}"):
        parse_topology(name)


def test_the_roofline_by_hand():
    found = roofline(CHIPS["v5e"], flops=197e9, hbm_bytes=819e6 / 2, sent_bytes=300e6)
    assert found.parts == pytest.approx({"matrix units": 1e-3, "HBM bandwidth": 0.5e-3, "interconnect": 1.5e-3})
    assert (found.limit, found.step_seconds) == ("interconnect", pytest.approx(1.5e-3))


def test_the_sizes_in_the_compiler_s_errors():
    temporaries = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (81.92G) exceeds "
        "available HBM (15.75G)."
    )
    assert read_shortage(temporaries, argument_bytes=7) == Shortage(round(81.92 * GIBIBYTE) + 7, int(15.75 * GIBIBYTE))
    used = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 16.52G of 15.75G hbm. "
        "Exceeded hbm capacity by 788.50M."
    )
    assert read_shortage(used, argument_bytes=7) == Shortage(round(16.52 * GIBIBYTE), int(15.75 * GIBIBYTE))
    assert read_shortage("INTERNAL: no sizes", argument_bytes=0) is None


def machine(limit, *, fixed=100.0, slope=3.0, bend=0.0, says=True):
    """A chip on which `rows` need fixed + slope * rows + bend * rows², and a list of what was compiled on it."""
    asked = []

    def compile_rows(rows):
        asked.append(rows)
        needed = fixed + slope * rows + bend * rows * rows
        return Attempt(rows, needed <= limit, needed if says or needed <= limit else None)

    return compile_rows, asked


@pytest.mark.parametrize(
    ("options", "first", "expected", "at_most"),
    [
        ({}, 32, 3300, 3),  # a straight line: what it predicts, and one above
        ({"bend": 1e-4}, 32, 3000, 6),  # bent: the line is corrected
        ({"says": False}, 32, 3300, 3),
        ({}, 100_000, 3300, 4),  # the first does not fit
        ({"slope": 2000}, 2, 4, 4),  # below a tile of rows
    ],
)
def test_the_largest_batch_in_few_compilations(options, first, expected, at_most):
    compile_rows, asked = machine(10_000, **options)
    found = largest_batch(compile_rows, compile_rows(first), fixed_bytes=100, limit_bytes=10_000)
    assert 0.94 * expected <= found.rows <= expected
    assert found.too_many is not None
    assert found.too_many - found.rows <= max(QUANTUM, 0.05 * found.rows)
    assert len(asked) - 1 <= at_most, asked
    assert [attempt.rows for attempt in found.attempts] == asked


def test_nobody_looks_beyond_what_there_is():
    """A packed batch of more texts than there are needs no more than one of all of them."""
    compile_rows, asked = machine(10_000)
    found = largest_batch(compile_rows, compile_rows(32), fixed_bytes=100, limit_bytes=10_000, most=1000)
    assert (found.rows, found.too_many, asked) == (1000, None, [32, 1000])


def test_where_not_one_row_fits():
    compile_rows, asked = machine(10_000, fixed=20_000)
    found = largest_batch(compile_rows, compile_rows(64), fixed_bytes=20_000, limit_bytes=10_000)
    assert (found.rows, found.too_many) == (0, 1)
    assert len(asked) <= 8
