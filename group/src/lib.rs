//! Process groups with virtual synchrony.
