"""Run as a script in a fresh process: loads packages with plain torch where gdn_ops cannot be imported.

Arguments: a file of ``[(package, args, kwargs), ...]`` for torch.load, and where to save the list of results.
"""

import sys


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("gdn_ops", "lowering", "export"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)


def main(calls: str, results: str) -> None:
    sys.meta_path.insert(0, Blocker())
    import torch

    try:
        import gdn_ops  # noqa: F401
    except ModuleNotFoundError:
        pass
    else:
        raise AssertionError("gdn_ops could be imported")
    packages, outputs = {}, []
    for package, args, kwargs in torch.load(calls):
        run = packages.setdefault(package, None) or torch._inductor.aoti_load_package(package)
        packages[package] = run
        outputs.append(run(*args, **kwargs))
    assert not any(name.split(".")[0] == "gdn_ops" for name in sys.modules)
    assert not hasattr(torch.ops.gdn, "chunk_gated_delta_rule")
    torch.save(outputs, results)


if __name__ == "__main__":
    main(*sys.argv[1:])
