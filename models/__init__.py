"""Host architectures made of slots, by the name that `config.model.name` gives."""

import importlib

from efficient.errors import UserError, nearest

_HOSTS = {
    "decoder": ("models.decoder", "Decoder"),
    "vision": ("models.vision", "Vision"),
    "dual_encoder": ("models.dual_encoder", "DualEncoder"),
    "stacked": ("models.operators", "Stacked"),
    "network": ("models.operators", "Network"),
}


def host(name: str) -> type:
    """The host class of that name, imported when it is asked for."""
    if name not in _HOSTS:
        raise UserError(f"config.model.name={name!r} is no host; {nearest(name, _HOSTS)}")
    module, cls = _HOSTS[name]
    return getattr(importlib.import_module(module), cls)
