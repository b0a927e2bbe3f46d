"""NVRTC, CUDA's compiler in a library, as a program: it compiles one source to machine code.

    python _nvrtc.py LIBRARY OPTION... SOURCE -o CUBIN
    python _nvrtc.py LIBRARY --version

A process of its own can be ended when it takes too long. Imports nothing of the package.
"""

import ctypes
import sys
from pathlib import Path

# Left empty, since a machine may have none of them: csrc/cuda/nvrtc.h has what the kernels use.
HEADERS = [
    *("algorithm", "cmath", "cstdint", "limits", "type_traits", "utility"),
    *("cooperative_groups.h", "cuda_bf16.h", "cuda_fp16.h", "cuda_pipeline.h"),
    *("cuda_runtime.h", "cuda_runtime_api.h"),
]


class Nvrtc:
    """The library's C interface. Its functions return 0, or the number of an error."""

    def __init__(self, library: Path) -> None:
        if library.is_absolute():
            # NVRTC opens it by its name, which is found once it is loaded from anywhere.
            for builtins in library.parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(builtins))
        self.functions = ctypes.CDLL(str(library))
        self.functions.nvrtcGetErrorString.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: object) -> None:
        error = getattr(self.functions, f"nvrtc{name}")(*arguments)
        if error:
            raise RuntimeError(f"{name}: {self.functions.nvrtcGetErrorString(error).decode()}")

    def version(self) -> str:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.call("Version", ctypes.byref(major), ctypes.byref(minor))
        return f"NVRTC {major.value}.{minor.value}"

    def output(self, program: ctypes.c_void_p, name: str) -> bytes:
        size = ctypes.c_size_t()
        self.call(f"Get{name}Size", program, ctypes.byref(size))
        content = ctypes.create_string_buffer(size.value)
        self.call(f"Get{name}", program, content)
        return content.raw

    def compile(self, source: Path, options: list[str]) -> bytes:
        """Ends the program with the compiler's messages if it refuses the source."""
        program, count = ctypes.c_void_p(), len(HEADERS)
        texts = (ctypes.c_char_p * count)(*[b""] * count)
        names = (ctypes.c_char_p * count)(*map(str.encode, HEADERS))
        text = source.read_bytes()
        create = (ctypes.byref(program), text, source.name.encode(), count, texts, names)
        self.call("CreateProgram", *create)
        given = (ctypes.c_char_p * len(options))(*map(str.encode, options))
        try:
            self.call("CompileProgram", program, len(options), given)
        except RuntimeError as error:
            log = self.output(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            sys.exit(f"{error}\n{log}")
        return self.output(program, "CUBIN")


def main(library: str, *arguments: str) -> None:
    nvrtc = Nvrtc(Path(library))
    if arguments == ("--version",):
        print(nvrtc.version())
        return
    *options, source, _, cubin = arguments
    Path(cubin).write_bytes(nvrtc.compile(Path(source), options))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (OSError, RuntimeError) as error:
        sys.exit(str(error))
