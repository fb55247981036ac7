/* The lower bound of a call of Python: a function called from C, with the GIL taken and released.
 * */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <time.h>

/* The seconds of `calls` calls with two arguments. Called without the GIL; negative if the function
 * raises. */
double time_calls(PyObject *function, PyObject *first, PyObject *second, int calls)
{
	PyGILState_STATE held = PyGILState_Ensure();
	PyThreadState *thread = PyEval_SaveThread();
	struct timespec start, end;
	int failed = 0;

	clock_gettime(CLOCK_MONOTONIC, &start);
	for (int i = 0; i < calls && !failed; i++) {
		PyObject *arguments[] = {NULL, first, second};

		PyEval_RestoreThread(thread);
		PyObject *result =
			PyObject_Vectorcall(function, arguments + 1, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
		if (result)
			Py_DECREF(result);
		else
			failed = 1;
		thread = PyEval_SaveThread();
	}
	clock_gettime(CLOCK_MONOTONIC, &end);
	PyEval_RestoreThread(thread);
	if (failed)
		PyErr_Print();
	PyGILState_Release(held);
	return failed ? -1 : end.tv_sec - start.tv_sec + (end.tv_nsec - start.tv_nsec) / 1e9;
}
