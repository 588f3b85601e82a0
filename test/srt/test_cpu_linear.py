"""Linear layers in C and through oneDNN against float64."""

from types import SimpleNamespace

import pytest
import torch

from sglang.srt.mezo.cpu import linear as module
from sglang.srt.mezo.cpu.linear import c_linear, linear


@pytest.fixture(params=["c", "onednn"])
def by(request, monkeypatch) -> str:
    """Both kinds, whatever this processor would take."""
    if request.param == "c" and not module.HAS_C:
        pytest.skip("linear.c was not built, or cannot run here")
    monkeypatch.setattr(module, "IN_C", request.param == "c")
    return request.param


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 3, 8, 9, 64, 65, 257, 1024, 1025])
@pytest.mark.parametrize("columns, outputs", [(96, 50), (1, 1), (1000, 96), (1537, 7)])
def test_equals_float64(by, rows, columns, outputs, bias):
    generator = torch.Generator().manual_seed(rows)
    x, weight, b = (
        torch.randn(*shape, generator=generator) for shape in ((rows, columns), (outputs, columns), (outputs,))
    )
    result = linear(x, weight, b if bias else None)
    expected = x.double() @ weight.double().T + (b if bias else 0)
    assert result.shape == (rows, outputs) and result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, atol=1e-6 * columns, rtol=1e-5)


def test_takes_inputs_and_weights_that_lie_in_larger_tensors(by):
    generator = torch.Generator().manual_seed(0)
    wide, tall, deep = (torch.randn(*shape, generator=generator) for shape in ((10, 200), (120, 64), (4, 5, 64)))
    weight, bias = tall[20:100], torch.randn(160, generator=generator)[::2]
    transposed = torch.randn(64, 30, generator=generator).T
    for x, w in (
        (wide[:, 30:94], weight),
        (wide[::2, :64], weight),
        (wide[:, 10:138:2], weight),
        (deep, weight),
        (wide[:, :64], transposed),
        (wide[:, :64], tall[::2]),
    ):
        torch.testing.assert_close(linear(x, w), x @ w.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(linear(deep, weight, bias), deep @ weight.T + bias, atol=1e-4, rtol=1e-4)


def test_rows_that_happen_to_lie_behind_an_input_do_not_matter(by):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(50, 64, generator=generator), torch.randn(80, 64, generator=generator)
    x[70:] = float("nan")
    result = linear(x[:70], weight)
    assert result.shape == (70, 50)
    torch.testing.assert_close(result, x[:70] @ weight.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [3, 24, 34, 41, 64, 80, 100, 576])
def test_numbers_that_are_not_finite_stay_in_their_row(columns, dtype):
    """As layers and the head call it; in bfloat16 oneDNN may read behind the end of a row."""
    generator = torch.Generator().manual_seed(0)
    weight, x, bias = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((96, columns), (70, columns), (96,))
    )
    layer = SimpleNamespace(weight=weight)

    def original(method, layer, x, bias):
        return torch.nn.functional.linear(x, layer.weight, bias)

    for added in (None, bias):
        expected = module.apply_linear(original, None, layer, x, added)
        bad = x.clone()
        bad[::3] = float("nan")
        result = module.apply_linear(original, None, layer, bad, added)
        kept = torch.arange(70) % 3 != 0
        assert result[~kept].isnan().all()
        torch.testing.assert_close(result[kept], expected[kept], atol=0, rtol=0)


@pytest.mark.skipif(not module.HAS_C, reason="linear.c was not built, or cannot run here")
def test_other_rows_do_not_change_a_bit_in_c():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((300, 900), (101, 900), (101,)))
    whole = c_linear(x, weight, bias)
    for first in (0, 1, 5, 8, 100):
        for rows in (*range(1, 40), 150, 200):
            assert torch.equal(c_linear(x[first : first + rows], weight, bias), whole[first : first + rows])


@pytest.mark.skipif(not module.HAS_C, reason="linear.c was not built, or cannot run here")
def test_numbers_that_are_not_finite_stay_in_their_row_in_c():
    x, weight = torch.ones(20, 64), torch.ones(30, 64)
    x[3, 5], x[4, 5] = float("nan"), float("inf")
    result = c_linear(x, weight)
    assert result[3].isnan().all() and result[4].isinf().all() and result[[0, 1, 2, *range(5, 20)]].eq(64).all()
