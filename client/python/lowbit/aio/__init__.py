"""The client for asyncio. It is the source that `lowbit.sync` is generated from."""
