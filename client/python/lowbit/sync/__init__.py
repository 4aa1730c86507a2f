"""The client for threads. Its modules are generated from `lowbit.aio`."""
