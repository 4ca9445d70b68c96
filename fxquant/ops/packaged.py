"""What AOTInductor's models call: the library of operators for programs without Python (csrc/torch/door.cpp).

A model finds the library where the process has it already, then beside itself, then where it was when the model was
compiled. A package (.pt2) carries it, so it needs nothing of fxquant where it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fxquant.ops.library import KERNELS_FILE, OPERATORS_FILE, operators_path

_CALL = "fxq_call_1"
_HEADER = r"""
#include <dlfcn.h>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace fxquant_operators {
// struct fxq_argument of fxquant's csrc/torch/door.h
struct argument {
    int64_t tag, count;
    union {
        int64_t integer;
        double number;
        const char *text;
        void *tensor;
        const argument *items;
    } as;
};
inline argument none() { return {0, 0, {0}}; }
inline argument integer(int64_t value) { return {1, 0, {value}}; }
inline argument number(double value) {
    argument made = {2, 0, {0}};
    made.as.number = value;
    return made;
}
inline argument text(const char *value) {
    argument made = {3, 0, {0}};
    made.as.text = value;
    return made;
}
template <typename T> inline argument tensor(const T &value) {
    argument made = {4, 0, {0}};
    made.as.tensor = value.get();
    return made;
}
inline argument list(std::initializer_list<argument> items) {
    argument made = {5, (int64_t)items.size(), {0}};
    made.as.items = items.begin();
    return made;
}

using function = const char *(*)(const char *, const argument *, int64_t, AtenTensorHandle *);
static function load() {
    Dl_info own;
    std::string beside = "OPERATORS", why;
    if (dladdr((void *)&load, &own) && own.dli_fname) {
        const std::string model = own.dli_fname;
        beside = model.substr(0, model.rfind('/') + 1) + beside;
    }
    for (const std::string &path : {std::string("OPERATORS"), beside, std::string("INSTALLED")}) {
        void *library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
        void *found = library ? dlsym(library, "CALL") : nullptr;
        if (found) return (function)found;
        const char *error = dlerror();
        why += std::string("; ") + (error ? error : "");
    }
    throw std::runtime_error("fxquant's operators cannot be loaded" + why);
}
static void call(const char *name, std::initializer_list<argument> args, AtenTensorHandle *results) {
    static const function run = load();
    const char *error = run(name, args.begin(), (int64_t)args.size(), results);
    if (error) throw std::runtime_error(error);
}
} // namespace fxquant_operators
"""


def takes(node: Any) -> bool:
    """Return whether a call, a FallbackKernel, can be written: on the CPU, where the library was built."""
    device = node.get_device()
    return operators_path() is not None and device is not None and device.type == "cpu"


def write_call(node: Any, wrapper: Any, name: str) -> None:
    """Write a call of an operator with all its arguments into a model's C++."""
    path = operators_path()
    assert path is not None
    references = [_Reference(x.codegen_reference()) for x in node.inputs]
    args, _ = node.unflatten_args(references, node.constant_args)
    values = ", ".join(_write(wrapper, value) for value in args)
    outputs = [output.get_name() for output in node.outputs or [node]]  # torch 2.14 has a single one as the call itself
    _write_header(wrapper, path)
    wrapper.writeline(f"AtenTensorHandle {outputs[0]}_results[{len(outputs)}];")
    wrapper.writeline(f'fxquant_operators::call("{name}", {{{values}}}, {outputs[0]}_results);')
    for i, output in enumerate(outputs):
        wrapper.writeline(f"RAIIAtenTensorHandle {output}({outputs[0]}_results[{i}]);")


class _Reference(str):
    """How a model's C++ names a tensor."""


def _write_header(wrapper: Any, path: str) -> None:
    files = [str(Path(path).with_name(KERNELS_FILE)), path]
    if path in wrapper.additional_files:
        return
    wrapper.additional_files.extend(files)
    header = _HEADER.replace("OPERATORS", OPERATORS_FILE).replace("INSTALLED", path).replace("CALL", _CALL)
    wrapper.header.splice(header)


def _write(wrapper: Any, value: Any) -> str:
    kind = "integer"  # a truth, a symbolic size
    if value is None:
        return "fxquant_operators::none()"
    if isinstance(value, (list, tuple)):
        return f"fxquant_operators::list({{{', '.join(_write(wrapper, item) for item in value)}}})"
    if isinstance(value, _Reference):
        return f"fxquant_operators::tensor({value})"
    if isinstance(value, torch.dtype):
        return f"fxquant_operators::integer({wrapper.codegen_dtype(value)})"
    if isinstance(value, str):
        kind = "text"
    elif isinstance(value, float):
        kind = "number"
    return f"fxquant_operators::{kind}({wrapper.val_to_arg_str_for_prim_type(value, None)})"
