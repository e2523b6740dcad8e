"""The compiler that Triton wants of a backend."""

from typing import Any, NoReturn

from triton.backends.compiler import BaseBackend, GPUTarget


class NoCompiler(BaseBackend):
    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "cpu"

    def hash(self) -> NoReturn:
        raise NotImplementedError("kernels are interpreted: set TRITON_INTERPRET=1")

    def parse_options(self, options: dict[str, Any]) -> NoReturn:
        raise NotImplementedError

    def add_stages(self, stages: dict[str, Any], options: object, language: object) -> NoReturn:
        raise NotImplementedError

    def load_dialects(self, context: object) -> NoReturn:
        raise NotImplementedError

    def get_module_map(self) -> NoReturn:
        raise NotImplementedError
