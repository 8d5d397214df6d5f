/* A bound layer's call in C: what linear.py's `product` does for a few tokens, without the interpreter in between. A layer
 * calls it itself, and so does the operator when it comes from the dispatcher, from compiled code say.
 *
 * A module of its own, built where Python's headers are; without it linear.py's way is taken. It keeps to the stable ABI of
 * Python 3.10, so that one build serves every later version, and to DLPack's exchange table, through which PyTorch says
 * where a tensor lies without headers of its own.
 */
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <stdint.h>

/* -- DLPack 1.x, as far as it is needed here ---------------------------------------------------------------------------- */

typedef struct {
    void *data;
    struct { int32_t type, id; } device;
    int32_t ndim;
    struct { uint8_t code, bits; uint16_t lanes; } dtype;
    int64_t *shape, *strides;    /* in elements */
    uint64_t byte_offset;
} dl_tensor;

typedef struct {
    struct { uint32_t major, minor; } version;
    void *previous;
    void *allocate, *own, *to_object;
    int (*describe)(void *object, dl_tensor *out); /* borrows the tensor's memory and its shape; may be NULL */
    void *stream;
} dl_exchange;

enum { ON_CPU = 1, FLOAT_CODE = 2, BFLOAT_CODE = 4 };

/* -- what all layers share ---------------------------------------------------------------------------------------------- */

enum { CODES, RESIDUAL, SCALES, EXPONENTS, BIAS, TENSORS };
enum { TYPES = 3 };              /* float32, float16, bfloat16, as in engine.h */
enum { LAYOUT = 4 };             /* bits, residual bits, group size, seed */

static struct {
    PyObject *tensor, *parameter;            /* the classes: nothing else is touched */
    PyObject *empty, *keywords[TYPES];       /* torch.empty and {"dtype": ...} */
    PyObject *threads, *grad_enabled;        /* torch.get_num_threads, torch.is_grad_enabled */
    PyObject *watchers;                      /* tuple of functions: if one returns something true, the dispatcher is asked */
    PyObject *forward_ad;                    /* a namespace whose "_current_level" is -1 unless forward mode is active */
    PyObject *names[TENSORS], *level, *requires_grad;
    const dl_exchange *exchange;
} torch;

typedef int run_function(const void *call, const void *x, void *y, int64_t m, int threads);

typedef struct {
    run_function *run;
    const void *call[TYPES];
    const void *at[TENSORS];     /* NULL: there is none */
    int64_t bytes[TENSORS];
    int32_t type[TENSORS];       /* as type_of says */
    int64_t in_features, layout[LAYOUT], rows, few;
    PyObject *owner;             /* of what `call` points to */
} bound;

static const char BOUND[] = "turboquant_weights.bound";

/* 1: yes, 0: no, -1: an error is set */
static int is_true(PyObject *function)
{
    PyObject *answer = PyObject_CallNoArgs(function);
    const int result = answer ? PyObject_IsTrue(answer) : -1;
    Py_XDECREF(answer);
    return result;
}

static int wants_gradient(PyObject *tensor)
{
    PyObject *answer = PyObject_GetAttr(tensor, torch.requires_grad);
    const int result = answer ? PyObject_IsTrue(answer) : -1;
    Py_XDECREF(answer);
    return result;
}

/* Whether the dispatcher must be asked, as is_direct of ops.py says for an ordinary tensor on a CPU. */
static int is_watched(PyObject *x, PyObject *bias)
{
    const Py_ssize_t count = PyTuple_Size(torch.watchers);
    for (Py_ssize_t i = 0; i < count; i++) {
        const int watched = is_true(PyTuple_GetItem(torch.watchers, i));
        if (watched) return watched;
    }
    PyObject *level = PyDict_GetItemWithError(torch.forward_ad, torch.level);
    const long active = level ? PyLong_AsLong(level) : 0;
    if (active != -1) return 1;
    if (PyErr_Occurred()) return -1;
    const int gradients = is_true(torch.grad_enabled);
    if (gradients <= 0) return gradients;
    const int wanted = wants_gradient(x);
    return wanted || bias == Py_None ? wanted : wants_gradient(bias);
}

/* Where a tensor lies that is on the CPU and has no gaps, and its number of entries. 0: it is no such tensor. */
static int describe(PyObject *object, dl_tensor *out, int64_t *count)
{
    PyObject *const class = (PyObject *)Py_TYPE(object);
    if (class != torch.tensor && class != torch.parameter) return 0;
    if (torch.exchange->describe(object, out)) { /* sparse, say: not for the engine */
        PyErr_Clear();
        return 0;
    }
    if (out->device.type != ON_CPU || out->dtype.lanes != 1) return 0;
    *count = 1;
    for (int32_t i = out->ndim; i-- > 0;) {
        if (out->strides && out->shape[i] != 1 && out->strides[i] != *count) return 0;
        *count *= out->shape[i];
    }
    out->data = (char *)out->data + out->byte_offset;
    return 1;
}

static int32_t type_of(const dl_tensor *tensor) { return tensor->dtype.code << 8 | tensor->dtype.bits; }

/* Whether tensor `i` is where it was when it was checked, and as large. */
static int is_known(const bound *layer, int i, PyObject *object)
{
    if (object == Py_None || !layer->at[i]) return object == Py_None && !layer->at[i];
    dl_tensor tensor;
    int64_t count;
    return describe(object, &tensor, &count) && tensor.data == layer->at[i] &&
           count * (tensor.dtype.bits / 8) == layer->bytes[i] && type_of(&tensor) == layer->type[i];
}

/* A new tensor of the shape of x, but for the last dimension. */
static PyObject *new_result(const dl_tensor *x, int64_t rows, int type)
{
    PyObject *shape = PyTuple_New(x->ndim), *result = NULL;
    for (int32_t i = 0; shape && i < x->ndim; i++) {
        PyObject *size = PyLong_FromLongLong(i + 1 < x->ndim ? x->shape[i] : rows);
        if (!size) Py_CLEAR(shape);
        else PyTuple_SetItem(shape, i, size);
    }
    if (shape) result = PyObject_Call(torch.empty, shape, torch.keywords[type]);
    Py_XDECREF(shape);
    return result;
}

/* The product, NULL with an error, or None: not for this way. All tensors are held by the caller. `dispatched`: whoever
 * watches has been asked. */
static PyObject *multiply(const bound *layer, PyObject *x, PyObject *const *tensors, int dispatched)
{
    dl_tensor input, output;
    int64_t count, results;
    if (Py_TYPE(x) != (PyTypeObject *)torch.tensor || !describe(x, &input, &count)) return Py_NewRef(Py_None);
    const int32_t kind = type_of(&input);
    const int type = kind == (FLOAT_CODE << 8 | 32)    ? 0
                     : kind == (FLOAT_CODE << 8 | 16)  ? 1
                     : kind == (BFLOAT_CODE << 8 | 16) ? 2
                                                       : -1;
    if (type < 0 || !input.ndim || input.shape[input.ndim - 1] != layer->in_features) return Py_NewRef(Py_None);
    const int64_t tokens = count / layer->in_features;
    if (tokens < 1 || tokens >= layer->few) return Py_NewRef(Py_None);
    for (int i = 0; i < TENSORS; i++)
        if (!is_known(layer, i, tensors[i])) return Py_NewRef(Py_None);
    const int watched = dispatched ? 0 : is_watched(x, tensors[BIAS]);
    if (watched) return watched < 0 ? NULL : Py_NewRef(Py_None);
    PyObject *out = new_result(&input, layer->rows, type), *threads = out ? PyObject_CallNoArgs(torch.threads) : NULL;
    const int many = threads ? (int)PyLong_AsLong(threads) : -1;
    Py_XDECREF(threads);
    int failed = 0;
    if (many > 0 && describe(out, &output, &results)) {
        PyThreadState *state = PyEval_SaveThread();
        failed = layer->run(layer->call[type], input.data, output.data, tokens, many);
        PyEval_RestoreThread(state);
        if (!failed) return out;
        PyErr_SetString(PyExc_MemoryError, "no memory for the rotated activations");
    }
    Py_XDECREF(out);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

static PyObject *call(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    if (count != 2 || !PyDict_Check(arguments[1])) {
        PyErr_SetString(PyExc_TypeError, "an input and a dictionary of parameters are needed");
        return NULL;
    }
    const bound *layer = PyCapsule_GetPointer(self, BOUND);
    if (!layer) return NULL;
    /* Each is asked for once and held to the end: another thread may give the layer others while the engine reads these. */
    PyObject *tensors[TENSORS], *result = NULL;
    int held = 0;
    for (; held < TENSORS; held++) {
        tensors[held] = PyDict_GetItemWithError(arguments[1], torch.names[held]);
        if (!tensors[held]) break;
        Py_INCREF(tensors[held]);
    }
    if (held == TENSORS) result = multiply(layer, arguments[0], tensors, 0);
    else if (!PyErr_Occurred()) result = Py_NewRef(Py_None); /* a parametrized bias, say */
    while (held-- > 0) Py_DECREF(tensors[held]);
    return result;
}

static PyMethodDef call_definition = {"product", (PyCFunction)(void (*)(void))call, METH_FASTCALL,
                                      "product(x, parameters): x W^T + bias, or None: ask elsewhere"};

/* -- the operator's kernel --------------------------------------------------------------------------------------------- */

/* The arguments of the operator, in the order of its schema. */
enum { X, PLANES, IN_FEATURES = PLANES + TENSORS, SCHEMA_LAYOUT, ARGUMENTS = SCHEMA_LAYOUT + LAYOUT };

/* Whether the numbers behind the tensors are the layer's; -1: an error is set. */
static int is_layout(const bound *layer, PyObject *const *arguments)
{
    for (int i = 0; i <= LAYOUT; i++) {
        const long long number = PyLong_AsLongLong(arguments[IN_FEATURES + i]);
        if (number == -1 && PyErr_Occurred()) return -1;
        if (number != (i ? layer->layout[i - 1] : layer->in_features)) return 0;
    }
    return 1;
}

/* What `call` does, for the layer that is known by the address of its codes. */
static PyObject *multiply_known(PyObject *known, PyObject *const *arguments)
{
    dl_tensor codes;
    int64_t count;
    if (!describe(arguments[PLANES + CODES], &codes, &count)) return Py_NewRef(Py_None);
    PyObject *key = PyLong_FromVoidPtr(codes.data), *function = key ? PyDict_GetItemWithError(known, key) : NULL;
    Py_XDECREF(key);
    if (!function) return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
    Py_INCREF(function); /* another thread may forget it while the engine runs */
    const bound *layer = PyCapsule_GetPointer(PyCFunction_GetSelf(function), BOUND);
    const int same = layer ? is_layout(layer, arguments) : -1;
    PyObject *result = NULL;
    if (same > 0 && codes.ndim == 2 && codes.shape[0] == layer->rows) /* and, in multiply, as many bytes */
        result = multiply(layer, arguments[X], arguments + PLANES, 1);
    else if (same >= 0)
        result = Py_NewRef(Py_None);
    Py_DECREF(function);
    return result;
}

static PyObject *operate(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    if (count == ARGUMENTS) {
        PyObject *result = multiply_known(PyTuple_GetItem(self, 0), arguments);
        if (result != Py_None) return result;
        Py_DECREF(result);
    }
    PyObject *all = PyTuple_New(count), *result = NULL;
    for (Py_ssize_t i = 0; all && i < count; i++) PyTuple_SetItem(all, i, Py_NewRef(arguments[i]));
    if (all) result = PyObject_CallObject(PyTuple_GetItem(self, 1), all);
    Py_XDECREF(all);
    return result;
}

static PyMethodDef operate_definition = {"linear", (PyCFunction)(void (*)(void))operate, METH_FASTCALL,
                                         "linear(x, codes, ...): the operator's kernel"};

/* kernel(known, other): a kernel with the operator's schema for a few tokens of the layers in `known`, a dictionary of what
 * `bind` returned by the addresses of the codes. All else it leaves to the function `other`. */
static PyObject *kernel(PyObject *module, PyObject *arguments)
{
    (void)module;
    PyObject *known, *other;
    if (!PyArg_ParseTuple(arguments, "O!O:kernel", &PyDict_Type, &known, &other)) return NULL;
    return PyCFunction_New(&operate_definition, arguments);
}

/* -- the module --------------------------------------------------------------------------------------------------------- */

static void release(PyObject *capsule)
{
    bound *layer = PyCapsule_GetPointer(capsule, BOUND);
    Py_XDECREF(layer->owner);
    PyMem_Free(layer);
}

/* bind(run, calls, tensors, in_features, layout, rows, few, owner): `run` and the three `calls`, in the order of engine.h's
 * types, are addresses; `tensors` are those of the layer, in the order of `names`. None: one of them is not for this way. */
static PyObject *bind(PyObject *module, PyObject *arguments)
{
    (void)module;
    unsigned long long run, calls[TYPES];
    long long in_features, layout[LAYOUT], rows, few;
    PyObject *tensors[TENSORS], *owner;
    if (!PyArg_ParseTuple(arguments, "K(KKK)(OOOOO)L(LLLL)LLO:bind", &run, &calls[0], &calls[1], &calls[2], &tensors[CODES],
                          &tensors[RESIDUAL], &tensors[SCALES], &tensors[EXPONENTS], &tensors[BIAS], &in_features,
                          &layout[0], &layout[1], &layout[2], &layout[3], &rows, &few, &owner))
        return NULL;
    bound *layer = PyMem_Calloc(1, sizeof *layer);
    if (!layer) return PyErr_NoMemory();
    layer->run = (run_function *)(uintptr_t)run;
    layer->in_features = in_features, layer->rows = rows, layer->few = few;
    for (int i = 0; i < LAYOUT; i++) layer->layout[i] = layout[i];
    for (int i = 0; i < TYPES; i++) layer->call[i] = (const void *)(uintptr_t)calls[i];
    for (int i = 0; i < TENSORS; i++) {
        dl_tensor tensor;
        int64_t count;
        if (tensors[i] == Py_None) continue;
        if (!describe(tensors[i], &tensor, &count)) {
            PyMem_Free(layer);
            return Py_NewRef(Py_None);
        }
        layer->at[i] = tensor.data;
        layer->bytes[i] = count * (tensor.dtype.bits / 8);
        layer->type[i] = type_of(&tensor);
    }
    Py_INCREF(owner);
    layer->owner = owner;
    PyObject *capsule = PyCapsule_New(layer, BOUND, release);
    if (!capsule) {
        Py_DECREF(owner);
        PyMem_Free(layer);
        return NULL;
    }
    PyObject *function = PyCFunction_New(&call_definition, capsule);
    Py_DECREF(capsule);
    return function;
}

/* prepare(Tensor, Parameter, exchange, empty, keywords, threads, grad_enabled, watchers, forward_ad): once, before anything
 * is bound. False: this PyTorch's table is of another kind. */
static PyObject *prepare(PyObject *module, PyObject *arguments)
{
    (void)module;
    PyObject *capsule;
    if (!PyArg_ParseTuple(arguments, "OOOO(OOO)OOO!O!:prepare", &torch.tensor, &torch.parameter, &capsule, &torch.empty,
                          &torch.keywords[0], &torch.keywords[1], &torch.keywords[2], &torch.threads, &torch.grad_enabled,
                          &PyTuple_Type, &torch.watchers, &PyDict_Type, &torch.forward_ad))
        return NULL;
    torch.exchange = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    if (!torch.exchange) return NULL;
    if (torch.exchange->version.major != 1 || !torch.exchange->describe) return PyBool_FromLong(0);
    static const char *const names[] = {"codes", "residual", "scales", "exponents", "bias"};
    for (int i = 0; i < TENSORS; i++)
        if (!(torch.names[i] = PyUnicode_InternFromString(names[i]))) return NULL;
    if (!(torch.level = PyUnicode_InternFromString("_current_level"))) return NULL;
    if (!(torch.requires_grad = PyUnicode_InternFromString("requires_grad"))) return NULL;
    Py_INCREF(arguments); /* for ever: it holds what `torch` points to */
    return PyBool_FromLong(1);
}

static PyMethodDef definitions[] = {
    {"prepare", prepare, METH_VARARGS, NULL},
    {"bind", bind, METH_VARARGS, NULL},
    {"kernel", kernel, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_call", NULL, -1, definitions, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__call(void) { return PyModule_Create(&definition); }
