"""The first call on a GPU without its delays."""

from . import _C

__all__ = ["warmup"]


def warmup(device: str | None = None) -> None:
    """Load the kernels that a GPU can run, and run each once.

    The driver loads a kernel when it is first launched, and on a card without machine code of its own compiles it then, into a
    cache on disk. After this no call has to wait for that, and any can be recorded in a CUDA graph. It waits for the GPU. One
    kernel of each decode row is left out, which few launches take: behind 256 streams, or 8,192 launches that were recorded.

    Parameters
    ----------
    device : {"cuda", "cuda:N"}, optional
        One GPU, "cuda" being the first; by default every GPU, and nothing where there is none.

    Raises
    ------
    TypeError, ValueError
        Not a CUDA device of this machine.
    RuntimeError, NotImplementedError
        No GPU can be used, although one was asked for.

    Examples
    --------
    >>> import flashgqa
    >>> flashgqa.warmup()
    """
    if device is None:
        for index in range(len(_C.build_info()["cuda_devices"])):
            _C.cuda_warmup(index)
        return
    if not isinstance(device, str):
        raise TypeError(f'device is {device!r}: it must be None, "cuda" or "cuda:<index>"')
    kind, colon, index = device.partition(":")
    if kind != "cuda" or (colon and not (index.isascii() and index.isdigit() and len(index) <= 4)):
        raise ValueError(f'device is {device!r}: it must be None, "cuda" or "cuda:<index>"')
    _C.cuda_warmup(int(index or 0))
