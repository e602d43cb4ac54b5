"""A model in which every file that could be run as code leaves a mark when run."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

from tiny import make_checkpoint

# Modules that we, our dependencies and our children import, or Python at its start.
MODULES = sorted(
    {name for name in sys.stdlib_module_names if not name.startswith("_")}
    - set(sys.builtin_module_names)
    | {"mlx", "mlx_lm", "moeflux_mlx", "numpy", "rich", "xxhash", "ziglang", "elftools"}
    | {"transformers", "tokenizers", "jinja2", "huggingface_hub", "threadpoolctl"}
    | {"matplotlib", "sitecustomize", "usercustomize", "typing_extensions", "torch"}
)


class Trap:
    """Writes a mark when it is unpickled."""

    def __init__(self, code: str):
        self.code = code

    def __reduce__(self):
        return exec, (self.code,)


def template(mark: Path) -> str:
    """Return a chat template that tries the known ways out of a sandbox."""
    reach = "''.__class__.__mro__[1].__subclasses__()"
    run = f"__import__('pathlib').Path('{mark}').write_text('template')"
    tries = [
        f"cycler.__init__.__globals__['__builtins__']['exec'](\"{run}\")",
        f"{reach}[0].__init__.__globals__['sys'].modules['os'].system('touch {mark}')",
        f'self.__init__.__globals__.__builtins__.exec("{run}")',
        f"raise_exception.__globals__['__builtins__']['exec'](\"{run}\")",
        f"strftime_now.__globals__['__builtins__']['exec'](\"{run}\")",
        "messages.append.__self__.__class__.__base__.__subclasses__()",
    ]
    # One way per message, so that an error in one does not hide the next.
    cases = [
        f"{{% if messages[0]['content'] == '{i}' %}}{{{{ {x} }}}}{{% endif %}}"
        for i, x in enumerate(tries)
    ]
    return "".join(cases) + "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


N_TEMPLATE_TRIES = 6


def make_hostile(path: Path, mark: Path) -> Path:
    """Write a small model that loads, and that writes ``mark`` if its code is run."""
    make_checkpoint(path)
    code = f"open({str(mark)!r}, 'a').write(__name__)\n"
    traps = f"{code}Model = ModelArgs = object\n"
    tokenizer = "from transformers import PreTrainedTokenizerFast as Mine\n"
    (path / "evil.py").write_text(traps + tokenizer)
    for name in MODULES:
        (path / f"{name}.py").write_text(code)
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth"):
        (path / name).write_bytes(pickle.dumps(Trap(code)))
    (path / "matplotlibrc").write_text("text.usetex: True\nbackend: module://evil\n")
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Mine", "AutoTokenizer": "evil.Mine"}
    (path / "config.json").write_text(json.dumps({**config, "model_file": "evil.py"}))
    file = path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "evil.Mine"]}
    settings["tokenizer_class"] = "Mine"
    settings["chat_template"] = template(mark)
    file.write_text(json.dumps({**settings, "trust_remote_code": True}))
    return path
