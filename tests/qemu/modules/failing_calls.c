// SPDX-License-Identifier: GPL-2.0
/*
 * For tests: has a kernel function fail when gpunvme.ko calls it, in kernels that were built without fault injection.
 *
 * A kprobe at the function's first instruction returns at once with what it was told to, if the return address lies
 * between `from` and `to`, and `skip` such calls have passed (Documentation/trace/kprobes.rst).
 * Writing a name to /sys/module/failing_calls/parameters/function begins that, writing nothing ends it.
 */
#include <linux/kprobes.h>
#include <linux/linkage.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/string.h>

static unsigned long from;
module_param(from, ulong, 0600);
static unsigned long to;
module_param(to, ulong, 0600);
static long result;
module_param(result, long, 0600);
static int skip;
module_param(skip, int, 0600);
static int failed;
module_param(failed, int, 0600);

static char name[KSYM_NAME_LEN];
static struct kprobe probe;
static DEFINE_MUTEX(lock);

void failing_calls_return(void);
/* Alignment and ENDBR as for any function that is jumped to. */
asm(".pushsection .text\n"
	".type failing_calls_return, @function\n"
	"failing_calls_return:\n"
	ASM_ENDBR
	ASM_RET
	".size failing_calls_return, .-failing_calls_return\n"
	".popsection\n");

static int before(struct kprobe *unused, struct pt_regs *regs)
{
	unsigned long caller = *(unsigned long *)regs->sp;

	if (caller < from || caller >= to || skip-- > 0)
		return 0;
	++failed;
	regs_set_return_value(regs, result);
	instruction_pointer_set(regs, (unsigned long)failing_calls_return);
	return 1;
}

NOKPROBE_SYMBOL(before);

static int set_function(const char *value, const struct kernel_param *unused)
{
	int error = 0;

	mutex_lock(&lock);
	if (*name)
		unregister_kprobe(&probe);
	*name = 0;
	memset(&probe, 0, sizeof(probe));
	if (strscpy(name, value, sizeof(name)) < 0)
		*name = 0;
	strim(name);
	if (*name) {
		probe.symbol_name = name;
		probe.pre_handler = before;
		error = register_kprobe(&probe);
	}
	if (error)
		*name = 0;
	mutex_unlock(&lock);
	return error;
}

static const struct kernel_param_ops operations = { .set = set_function };
module_param_cb(function, &operations, NULL, 0200);

static int __init start(void)
{
	return 0;
}
module_init(start);

static void __exit end(void)
{
	if (*name)
		unregister_kprobe(&probe);
}
module_exit(end);

MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Calls that fail, for tests");
