"""Every option of stock fairseq's commands, tried with this plugin and beside it without."""
