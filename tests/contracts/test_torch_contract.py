"""Private and undocumented parts of torch."""

import datetime
import socket

import pytest
import torch

LIBRARY = "torch"
SEEN = ("2.11.0", "2.13.0")


def schema(name: str) -> str:
    return str(torch._C._jit_get_schemas_for_operator(name)[0])


def test_reordered_weights():
    """`torch.ops.mkldnn._reorder_linear_weight(weight, rows)`, in quant/onednn_linear.py: the layout that oneDNN
    multiplies with."""
    assert schema("mkldnn::_reorder_linear_weight").startswith(
        "mkldnn::_reorder_linear_weight(Tensor self, int? batch_size=None) -> Tensor"
    )


def test_products_with_reordered_weights():
    """`torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")`, in quant/onednn_linear.py: the
    product with a reordered weight, the same as with the plain one."""
    assert schema("mkldnn::_linear_pointwise").startswith(
        "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> "
    )
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor's oneDNN does not compute in bfloat16")
    weight, inputs = torch.randn(64, 128).bfloat16(), torch.randn(5, 128).bfloat16()
    bias = torch.randn(64).bfloat16()
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight, 8)
    found = torch.ops.mkldnn._linear_pointwise(inputs, reordered, bias, "none", [], "")
    assert torch.equal(found, torch.nn.functional.linear(inputs, weight, bias))


def test_whether_onednn_computes_in_bfloat16():
    """`torch.ops.mkldnn._is_mkldnn_bf16_supported()`, in quant/onednn_linear.py: of this processor."""
    assert isinstance(torch.ops.mkldnn._is_mkldnn_bf16_supported(), bool)


def test_rendezvous_of_our_own():
    """`register_rendezvous_handler(scheme, handler)`, in launch/rendezvous.py: chosen by the URL's scheme, called with
    the URL and keywords; a scheme that is known already is a RuntimeError."""
    from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

    calls = []

    def meet(url, **given):
        calls.append((url, set(given)))
        yield "store", 0, 1

    scheme = f"contract{len(calls)}{id(calls)}"
    register_rendezvous_handler(scheme, meet)
    with pytest.raises(RuntimeError):
        register_rendezvous_handler(scheme, meet)
    found = next(rendezvous(f"{scheme}://", timeout=datetime.timedelta(seconds=5)))
    assert found == ("store", 0, 1)
    assert calls == [(f"{scheme}://", {"timeout"})]


def test_store_on_a_socket_of_ours():
    """`TCPStore(master_listen_fd=...)`, in launch/rendezvous.py: the store listens on a socket that is bound already,
    and closes it."""
    import torch.distributed as dist

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(8)
    host, port = listener.getsockname()
    seconds = datetime.timedelta(seconds=10)
    store = dist.TCPStore(host, port, 1, True, seconds, master_listen_fd=listener.detach())
    store.set("name", "value")
    other = dist.TCPStore(host, port, 1, False, seconds)
    assert other.get("name") == b"value"


def test_how_often_the_compiler_may_start_again():
    """`torch._dynamo.config.recompile_limit`, in engine/runner/fusion.py: of each function, 8 where nobody sets it."""
    import torch._dynamo

    before = torch._dynamo.config.recompile_limit
    assert isinstance(before, int)
    with torch._dynamo.config.patch(recompile_limit=64):
        assert torch._dynamo.config.recompile_limit == 64
    assert torch._dynamo.config.recompile_limit == before
