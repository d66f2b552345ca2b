"""Every Redis command that FedMoE sends, and the only place that sends one."""
