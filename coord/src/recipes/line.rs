//! A line of contenders: who stands before whom. Nothing but names goes in here.

/// The counter in a sequential znode's name. It may wrap around, as ZooKeeper's does after 2^31.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sequence(u32);

impl Sequence {
    /// Of the digits at the end of a name, a sign before them where it has wrapped.
    pub(crate) fn parse(digits: &str) -> Option<Self> {
        let unsigned = digits.strip_prefix('-').unwrap_or(digits);
        if unsigned.len() < 9 || !unsigned.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        let number: i64 = digits.parse().ok()?;
        u32::try_from(number & 0xffff_ffff).ok().map(Self)
    }

    /// Whether this one came before the other; they are less than 2^31 apart.
    pub(crate) const fn before(self, other: Self) -> bool {
        self.0.wrapping_sub(other.0).cast_signed() < 0
    }
}

/// The marks by which a line knows its contenders: what stands before the counter, and what that
/// means. The first one is what we write ourselves.
pub(crate) type Marks<K> = &'static [(&'static str, K)];

/// What kind of contender has this name, and its number; `None` for what does not belong here.
pub(crate) fn parse<K: Copy>(name: &str, marks: Marks<K>) -> Option<(K, Sequence)> {
    marks.iter().find_map(|(mark, kind)| {
        let (_, digits) = name.rsplit_once(mark)?;
        Some((*kind, Sequence::parse(digits)?))
    })
}

/// The contenders among these children, in the order in which they came.
pub(crate) fn in_order<K: Copy>(children: &[String], marks: Marks<K>) -> Vec<(&str, K)> {
    let mut line: Vec<_> = children
        .iter()
        .filter_map(|name| parse(name, marks).map(|(kind, number)| (name.as_str(), kind, number)))
        .collect();
    line.sort_by(|(a_name, _, a), (b_name, _, b)| {
        if a == b {
            a_name.cmp(b_name)
        } else if a.before(*b) {
            std::cmp::Ordering::Less
        } else {
            std::cmp::Ordering::Greater
        }
    });
    line.into_iter()
        .map(|(name, kind, _)| (name, kind))
        .collect()
}

/// Where we stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Position<'a> {
    /// Not in the line at all.
    Gone,
    /// Nobody is in our way.
    Free,
    /// This one is the nearest that is in our way. Nothing changes for us before it goes.
    Behind(&'a str),
}

/// Where the contender stands whose name contains `mine`, when those kinds which `blocks` picks are
/// in its way if they came before it.
pub(crate) fn position<'a, K: Copy>(
    children: &'a [String],
    mine: &str,
    marks: Marks<K>,
    blocks: impl Fn(K) -> bool,
) -> Position<'a> {
    let line = in_order(children, marks);
    // Where a lost answer made us come twice, the first one counts.
    let Some(me) = line.iter().position(|(name, _)| name.contains(mine)) else {
        return Position::Gone;
    };
    match line[..me].iter().rev().find(|(_, kind)| blocks(*kind)) {
        Some((name, _)) => Position::Behind(name),
        None => Position::Free,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARKS: Marks<char> = &[("lock-", 'c'), ("__lock__", 'k')];

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn names_of_curator_and_kazoo() {
        let number = |digits| Sequence::parse(digits).unwrap();
        assert_eq!(
            parse("_c_0a-lock-0000000007", MARKS),
            Some(('c', number("0000000007")))
        );
        assert_eq!(
            parse("deadbeef__lock__0000000008", MARKS),
            Some(('k', number("0000000008")))
        );
        for foreign in [
            "ready",
            "lock-",
            "lock-12",
            "x-lock-00000x0001",
            "0000000001",
        ] {
            assert_eq!(parse(foreign, MARKS), None, "{foreign}");
        }
    }

    #[test]
    fn the_counter_wraps_as_zookeepers_does() {
        // Java's %010d of 2147483646, 2147483647, -2147483648, -2147483647, ..., -1, 0.
        let texts = ["2147483646", "2147483647", "-2147483648", "-2147483647"];
        let numbers: Vec<_> = texts.map(|text| Sequence::parse(text).unwrap()).into();
        for (i, a) in numbers.iter().enumerate() {
            for (j, b) in numbers.iter().enumerate() {
                assert_eq!(a.before(*b), i < j, "{} {}", texts[i], texts[j]);
            }
        }
        let (last, zero) = (Sequence::parse("-000000001"), Sequence::parse("0000000000"));
        assert!(last.unwrap().before(zero.unwrap()));
    }

    /// All lines of up to six contenders of two kinds in any order of listing: the verdict against
    /// its definition.
    #[test]
    fn position_is_the_nearest_blocker_before_us() {
        const KINDS: Marks<char> = &[("r-", 'r'), ("w-", 'w')];
        for length in 0..=6_u32 {
            for kinds in 0..1_u32 << length {
                let line: Vec<String> = (0..length)
                    .map(|i| {
                        let kind = if kinds >> i & 1 == 0 { 'r' } else { 'w' };
                        format!("<{i}>{kind}-{i:010}")
                    })
                    .collect();
                let mut listed = line.clone();
                listed.push("ready".into());
                let by = kinds as usize % listed.len();
                listed.rotate_left(by);
                for me in 0..line.len() {
                    let mine = format!("<{me}>");
                    let wanted = line[..me].iter().rev().find(|name| name.contains("w-"));
                    assert_eq!(
                        position(&listed, &mine, KINDS, |kind| kind == 'w'),
                        wanted.map_or(Position::Free, |name| Position::Behind(name))
                    );
                    let wanted = me.checked_sub(1).map(|before| &line[before]);
                    assert_eq!(
                        position(&listed, &mine, KINDS, |_| true),
                        wanted.map_or(Position::Free, |name| Position::Behind(name))
                    );
                }
                assert_eq!(position(&listed, "<9>", KINDS, |_| true), Position::Gone);
            }
        }
    }

    #[test]
    fn who_came_twice_stands_at_its_first_place() {
        let children = names(&[
            "b-lock-0000000002",
            "a-lock-0000000001",
            "b-lock-0000000000",
        ]);
        assert_eq!(position(&children, "b-", MARKS, |_| true), Position::Free);
        assert_eq!(
            position(&children, "a-", MARKS, |_| true),
            Position::Behind("b-lock-0000000000")
        );
    }
}
