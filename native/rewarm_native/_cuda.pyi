from typing import Any, Protocol

class _FFI(Protocol):
    error: type[Exception]

    def dlopen(self, path: str, flags: int = ..., /) -> Any: ...
    def new(self, cdecl: str, init: object = ..., /) -> Any: ...
    def string(self, pointer: Any, /) -> bytes: ...

ffi: _FFI
