"""Linear layers through oneDNN against float64."""

import pytest
import torch

from sglang.srt.mezo.cpu.linear import linear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 3, 64, 65, 257, 1024, 1025])
def test_equals_float64(rows, bias):
    generator = torch.Generator().manual_seed(rows)
    x, weight, b = (torch.randn(*shape, generator=generator) for shape in ((rows, 96), (50, 96), (50,)))
    result = linear(x, weight, b if bias else None)
    expected = x.double() @ weight.double().T + (b if bias else 0)
    assert result.shape == (rows, 50) and result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, atol=1e-4, rtol=1e-5)


def test_takes_inputs_and_weights_that_lie_in_larger_tensors():
    generator = torch.Generator().manual_seed(0)
    wide, tall, deep = (torch.randn(*shape, generator=generator) for shape in ((10, 200), (120, 64), (4, 5, 64)))
    weight = tall[20:100]
    transposed = torch.randn(64, 30, generator=generator).T
    for x, w in ((wide[:, 30:94], weight), (wide[::2, :64], weight), (deep, weight), (wide[:, :64], transposed), (wide[:, :64], tall[::2])):
        torch.testing.assert_close(linear(x, w), x @ w.T, atol=1e-4, rtol=1e-4)


def test_rows_that_happen_to_lie_behind_an_input_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(50, 64, generator=generator), torch.randn(80, 64, generator=generator)
    x[70:] = float("nan")
    result = linear(x[:70], weight)
    assert result.shape == (70, 50)
    torch.testing.assert_close(result, x[:70] @ weight.T, atol=1e-4, rtol=1e-4)
