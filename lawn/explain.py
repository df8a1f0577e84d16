"""One-line messages for the errors of Hydra and OmegaConf."""

import re
from dataclasses import is_dataclass
from traceback import walk_tb

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from lawn.config import Config
from lawn.errors import UserError


def allowed_keys(section: str) -> str:
    """The keys of a section of the config, or of the config itself for any other name."""
    default = Config()
    owner = getattr(default, section, None)
    name, owner = (section, owner) if is_dataclass(owner) else ("the config", default)
    return f"{name} takes {', '.join(vars(owner))}"


def is_hydra_error(error: BaseException) -> bool:
    """Whether the error, of any type, was raised by Hydra or a package that it uses."""
    packages = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame, _ in walk_tb(error.__traceback__)]
    while packages and packages[-1] not in ("hydra", "omegaconf", "lawn", "run", "__main__"):
        packages.pop()
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        return False  # an invalid path
    return bool(packages) and packages[-1] in ("hydra", "omegaconf")


def explain(error: BaseException) -> str:
    """One line for an exception; for those of Hydra and OmegaConf the key, and then what is allowed there."""
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    if "Config group override must be" in str(error):
        return f"{_override(error)}: must be the name of a member of the group"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        path = str(error.missing_cfg_file)
        folder = path.rpartition("/")[0]  # sweep/ncf of sweep=ncf/adam, whose group is sweep
        group = folder if folder.startswith("hydra/") else folder.partition("/")[0]
        known = ", ".join(sorted(error.options)) + (f" or from conf/{folder}" if folder != group else "")
        return f"{group}={path.removeprefix(f'{group}/')}: no such {group}; choose from {known}"
    if isinstance(error.__cause__, OmegaConfBaseException) and not isinstance(error, UserError):
        error = error.__cause__
    key = str(getattr(error, "full_key", None) or "")
    if isinstance(error, (ConfigAttributeError, ConfigKeyError)) and key:
        return f"{key}: no such key; {allowed_keys(key.rpartition('.')[0])}"
    if isinstance(error, MissingMandatoryValue):
        return f"{key}: needs a value"
    text = " ".join(line.strip() for line in str(error).splitlines())
    if "interpolation '${dataset}-${optim}'" in text:  # the name of the preset
        return "dataset and optim: each must be the name of one member of its group"
    text = text.split(" full_key:")[0].split(" See https:")[0] or type(error).__name__
    return f"{key}: {text}" if key else text


def _unreadable(override: str) -> str:
    """Why an override is not in Hydra's grammar, and how to write it."""
    override = " ".join(override.split())
    key, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"(\+\+?|~)?[\w.@/]+", key):
        return f"{override}: must be key=value, without spaces around the sign"
    if value[:1] in ("[", "{", "(") or re.fullmatch(r"\w+\(.*", value):
        return f"{override}: cannot be read; a list is [a,b], what opens has to be closed"
    inner = "'" if '"' in value else '"'
    outer = "'" if inner == '"' else '"'
    quoted = f"{key}={inner}{value}{inner}"
    # With quotes of both kinds inside, the shell's are up to the user.
    whole = quoted if outer in value else f"{outer}{quoted}{outer}"
    return f"{override}: cannot be read; quote the value, once for Hydra and once for the shell: {whole}"


def _override(error: BaseException) -> str:
    """The override that Hydra was parsing when it raised the error."""
    found = [frame.f_locals.get("override") for frame, _ in walk_tb(error.__traceback__)]
    lines = [line for override in reversed(found) if (line := getattr(override, "input_line", None))]
    return " ".join(lines[0].split()) if lines else "an override"
