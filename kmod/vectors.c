// SPDX-License-Identifier: GPL-2.0
/*
 * Interrupts as eventfds.
 */
#include <linux/interrupt.h>
#include <linux/nospec.h>

#include "gpunvme.h"

static irqreturn_t on_interrupt(int irq, void *context)
{
	struct gpunvme_vector_state *vector = context;
	unsigned long flags;

	spin_lock_irqsave(&vector->lock, flags);
	if (vector->target) {
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 8, 0)
		eventfd_signal(vector->target);
#else
		eventfd_signal(vector->target, 1);
#endif
		atomic64_inc(&vector->counts->interrupts);
	}
	spin_unlock_irqrestore(&vector->lock, flags);
	return IRQ_HANDLED;
}

/**
 * gpunvme_allocate_vectors() - get interrupts for the function
 * @owner: the function
 *
 * Return: 0; having none is no error, since queues can be polled.
 */
int gpunvme_allocate_vectors(struct gpunvme *owner)
{
	int count = pci_alloc_irq_vectors(owner->pdev, 1, GPUNVME_MOST_VECTORS, PCI_IRQ_MSIX | PCI_IRQ_MSI);
	int i;

	owner->vectors = max(count, 0);
	for (i = 0; i < owner->vectors; ++i) {
		struct gpunvme_vector_state *vector = &owner->vector[i];

		spin_lock_init(&vector->lock);
		vector->counts = &owner->counts;
		snprintf(vector->name, sizeof(vector->name), "gpunvme%d-%d", owner->number, i);
	}
	return 0;
}

/**
 * gpunvme_free_vectors() - give the interrupts back
 * @owner: the function; no vector has a target
 */
void gpunvme_free_vectors(struct gpunvme *owner)
{
	if (owner->vectors)
		pci_free_irq_vectors(owner->pdev);
	owner->vectors = 0;
}

static struct eventfd_ctx *exchange(struct gpunvme_vector_state *vector, struct eventfd_ctx *target)
{
	struct eventfd_ctx *before;
	unsigned long flags;

	spin_lock_irqsave(&vector->lock, flags);
	before = vector->target;
	vector->target = target;
	spin_unlock_irqrestore(&vector->lock, flags);
	return before;
}

/**
 * gpunvme_set_vector() - pass an interrupt on to an eventfd
 * @owner: the function; its gate is held
 * @number: of the vector
 * @fd: the eventfd, or -1
 *
 * Return: 0, or a negative error.
 */
int gpunvme_set_vector(struct gpunvme *owner, u32 number, int fd)
{
	struct gpunvme_vector_state *vector;
	struct eventfd_ctx *target = NULL;
	int error;

	if (number >= owner->vectors)
		return -EINVAL;
	vector = &owner->vector[array_index_nospec(number, owner->vectors)];
	if (fd >= 0) {
		target = eventfd_ctx_fdget(fd);
		if (IS_ERR(target))
			return PTR_ERR(target);
		if (!vector->irq) {
			int irq = pci_irq_vector(owner->pdev, number);

			error = request_irq(irq, on_interrupt, 0, vector->name, vector);
			if (error) {
				eventfd_ctx_put(target);
				return error;
			}
			vector->irq = irq;
		}
	}
	target = exchange(vector, target);
	if (target)
		eventfd_ctx_put(target);
	return 0;
}

/**
 * gpunvme_clear_vectors() - pass nothing on any more
 * @owner: the function
 */
void gpunvme_clear_vectors(struct gpunvme *owner)
{
	int i;

	for (i = 0; i < owner->vectors; ++i) {
		struct gpunvme_vector_state *vector = &owner->vector[i];
		struct eventfd_ctx *target;

		if (vector->irq)
			free_irq(vector->irq, vector);
		vector->irq = 0;
		target = exchange(vector, NULL);
		if (target)
			eventfd_ctx_put(target);
	}
}
