// SPDX-License-Identifier: GPL-2.0
/*
 * What is going on, for whoever debugs: /sys/kernel/debug/gpunvme/BDF/{stats,mappings}.
 */
#include <linux/debugfs.h>
#include <linux/seq_file.h>

#include "gpunvme.h"

static struct dentry *root;

static int stats_show(struct seq_file *out, void *unused)
{
	struct gpunvme *owner = out->private;
	struct gpunvme_counts *counts = &owner->counts;
	const struct {
		const char *name;
		atomic64_t *value;
	} lines[] = {
		{ "opened", &counts->opened },
		{ "mapped", &counts->mapped },
		{ "unmapped", &counts->unmapped },
		{ "refused", &counts->refused },
		{ "revoked", &counts->revoked },
		{ "quiesced", &counts->quiesced },
		{ "unwilling", &counts->unwilling },
		{ "interrupts", &counts->interrupts },
		{ "pinned_bytes", &counts->pinned },
		{ "attached_bytes", &counts->attached },
	};
	int i;

	for (i = 0; i < ARRAY_SIZE(lines); ++i)
		seq_printf(out, "%s %lld\n", lines[i].name, (long long)atomic64_read(lines[i].value));
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(stats);

static int mappings_show(struct seq_file *out, void *unused)
{
	struct gpunvme *owner = out->private;
	struct gpunvme_mapping *mapping;
	unsigned long handle;

	seq_puts(out, "# handle kind access bytes segments first-bus-address\n");
	down_read(&owner->gate);
	if (owner->opener) {
		mutex_lock(&owner->opener->lock);
		xa_for_each(&owner->opener->mappings, handle, mapping) {
			/* An exporter may take a dma-buf back at any time: only its own lock holds the table. */
			if (mapping->attachment)
				seq_printf(out, "%lu dmabuf %s %llu - -%s\n", handle,
					   mapping->direction == DMA_BIDIRECTIONAL ? "rw" : "r", mapping->nbytes,
					   mapping->is_revoked ? " revoked" : "");
			else
				seq_printf(out, "%lu user %s %llu %u %pad\n", handle,
					   mapping->direction == DMA_BIDIRECTIONAL ? "rw" : "r", mapping->nbytes,
					   mapping->table->nents, &sg_dma_address(mapping->table->sgl));
		}
		mutex_unlock(&owner->opener->lock);
	}
	up_read(&owner->gate);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(mappings);

/**
 * gpunvme_debugfs_start() - make the folder of the module
 *
 * Nothing of debugfs can fail for the module: what is not there is not shown.
 */
void gpunvme_debugfs_start(void)
{
	root = debugfs_create_dir("gpunvme", NULL);
}

/**
 * gpunvme_debugfs_end() - remove the folder of the module
 */
void gpunvme_debugfs_end(void)
{
	debugfs_remove_recursive(root);
}

/**
 * gpunvme_debugfs_add() - show a function
 * @owner: the function
 */
void gpunvme_debugfs_add(struct gpunvme *owner)
{
	owner->folder = debugfs_create_dir(pci_name(owner->pdev), root);
	debugfs_create_file("stats", 0400, owner->folder, owner, &stats_fops);
	debugfs_create_file("mappings", 0400, owner->folder, owner, &mappings_fops);
}

/**
 * gpunvme_debugfs_remove() - show it no longer; waits for whoever reads
 * @owner: the function
 */
void gpunvme_debugfs_remove(struct gpunvme *owner)
{
	debugfs_remove_recursive(owner->folder);
}
