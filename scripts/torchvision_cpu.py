"""Make PyPI's torchvision importable beside a CPU build of torch.

torchvision's wheel on PyPI is a CUDA build. Its compiled extension does not load beside CPU torch, which torchvision
tolerates, but it then registers fake kernels for two operators that the extension would have declared, and
`import torchvision` dies with "operator torchvision::nms does not exist". vLLM's LLaVA imports torchvision in every
process, so the two schemas have to exist in every process, before anything of ours is loaded. (`torchvision.ops.nms`
itself has no kernel then and says so when called; neither vLLM nor this project calls it.)

`python scripts/torchvision_cpu.py` copies this file into the running interpreter's site-packages, with a `.pth` file
that imports it at start, but only where `import torchvision` really fails that way. Imported, it costs one entry on
`sys.meta_path`; torch is not imported. It acts between torchvision's attempt to load its extension and the first use
of the operators, and only if the extension is absent, so it stays out of the way of a torchvision that works.
"""

import importlib.abc
import sys

MODULE = "_vtprune_torchvision_cpu"
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Finds nothing; declares the schemas when torchvision is about to use them."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision._meta_registrations":
            sys.meta_path.remove(self)
            extension = sys.modules.get("torchvision.extension")
            if extension is not None and not extension._has_ops():
                import torch

                self.library = torch.library.Library("torchvision", "FRAGMENT")
                for schema in SCHEMAS:
                    self.library.define(schema)
                extension._vtprune_operators = self  # the schemas live as long as the library object
        return


def install() -> int:
    import shutil
    import subprocess
    import sysconfig
    from pathlib import Path

    def import_error() -> str:
        done = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True)
        return done.stderr.strip() if done.returncode else ""

    error = import_error()
    if not error or "No module named 'torchvision'" in error:
        return 0
    if "torchvision::nms does not exist" not in error:
        print(error, file=sys.stderr)
        return 1
    site = Path(sysconfig.get_paths()["purelib"])
    shutil.copyfile(__file__, site / f"{MODULE}.py")
    (site / f"{MODULE}.pth").write_text(f"import {MODULE}\n")
    error = import_error()
    if error:
        print(error, file=sys.stderr)
        return 1
    print(f"torchvision has no CPU extension here: wrote {site / MODULE}.pth so that it imports")
    return 0


if __name__ == "__main__":
    raise SystemExit(install())
if __name__ == MODULE:
    sys.meta_path.insert(0, DeclareOperators())
