"""The shapes of the demo's SQL: a question (`?`, several ways to ask it) and the query that answers it (`=`).

Names in capitals are identifiers as the database has them: P the parent table, C the child, P_LABEL a column.
Names in small letters are their words in English: p_label. WHICH is one of FILTERS and speaks of the child.
A line that begins with a blank continues the one before.
"""

# (phrase of the question, condition of the query)
FILTERS = (
    ("whose {c_category} is {value}", "{C_CATEGORY} = '{value}'"),
    ("with {c_category} {value} or {other}", "{C_CATEGORY} IN ('{value}', '{other}')"),
    ("whose {c_category} is anything but {value}", "{C_CATEGORY} <> '{value}'"),
    ("with {c_number} above {n}", "{C_NUMBER} > {n}"),
    ("with {c_number} of at most {n}", "{C_NUMBER} <= {n}"),
    ("with {c_number} from {low} to {high}", "{C_NUMBER} BETWEEN {low} AND {high}"),
    ("{c_day} in {year}", "strftime('%Y', {C_DAY}) = '{year}'"),
    ("{c_day} on or after {day}", "{C_DAY} >= '{day}'"),
    ("{c_day} before {day}", "{C_DAY} < '{day}'"),
    ("{c_day} between {day} and {later}", "{C_DAY} BETWEEN '{day}' AND '{later}'"),
    ("{c_day} in any {month}", "strftime('%m', {C_DAY}) = '{mm}'"),
    ("whose {c_label} starts with {letter}", "{C_LABEL} LIKE '{letter}%'"),
    ("of {c_category} {value} whose {c_number} exceeds {n}", "{C_CATEGORY} = '{value}' AND {C_NUMBER} > {n}"),
    (
        "{c_day} in {year} with {c_number} under {n}",
        "strftime('%Y', {C_DAY}) = '{year}' AND {C_NUMBER} < {n}",
    ),
    ("of {c_category} {value} or {c_day} after {day}", "({C_CATEGORY} = '{value}' OR {C_DAY} > '{day}')"),
)

# (word of the question, function of the query)
AGGREGATES = (
    ("average", "AVG"),
    ("total", "SUM"),
    ("highest", "MAX"),
    ("lowest", "MIN"),
)

SHAPES = """
? List the {c_label} of all {children} {which}.
? Which {children} {which} are there? Give the {c_label}.
? I need the {c_label} of {children} {which}.
= SELECT {C_LABEL} FROM {C} WHERE {WHICH}

? Show {c_label} and {c_number} of {children} {which}, the largest {c_number} first.
? For {children} {which}: {c_label} and {c_number}, sorted downwards by {c_number}.
= SELECT {C_LABEL}, {C_NUMBER} FROM {C} WHERE {WHICH} ORDER BY {C_NUMBER} DESC

? What are the {k} {children} with the most {c_number}? Only those {which}.
? Top {k} by {c_number} among {children} {which}.
= SELECT {C_LABEL}, {C_NUMBER} FROM {C} WHERE {WHICH} ORDER BY {C_NUMBER} DESC LIMIT {k}

? How many {children} {which} do we have?
? Count the {children} {which}.
? Number of {children} {which}?
= SELECT COUNT(*) FROM {C} WHERE {WHICH}

? What is the {agg} {c_number} of {children} {which}?
? Give me the {agg} {c_number} over all {children} {which}.
= SELECT {AGG}({C_NUMBER}) FROM {C} WHERE {WHICH}

? What different values of {c_category} occur among {children} {which}?
? Each {c_category} once, for {children} {which}.
= SELECT DISTINCT {C_CATEGORY} FROM {C} WHERE {WHICH}

? List {c_label} of the {children} {which} together with the {p_label} of their {parent}.
? {children} {which}: their {c_label}, and to which {parent} they belong.
= SELECT {C_LABEL}, {P_LABEL} FROM {C} JOIN {P} ON {P}.id = {C}.{KEY} WHERE {WHICH}

? Which {children} belong to {parents} with {p_category} {p_value}?
? Give the {c_label} of {children} whose {parent} has {p_category} {p_value}.
= SELECT {C_LABEL} FROM {C} JOIN {P} ON {P}.id = {C}.{KEY} WHERE {P_CATEGORY} = '{p_value}'

? How many {children} belong to the {parent} {p_name}?
? Count what {p_name} has in {children}.
= SELECT COUNT(*) FROM {C} JOIN {P} ON {P}.id = {C}.{KEY} WHERE {P_LABEL} = '{p_name}'

? Newest {child} of the {parent} {p_name}: its {c_label} and when it was {c_day}.
? What was {c_day} last for {p_name}?
= SELECT {C_LABEL}, {C_DAY} FROM {C} JOIN {P} ON {P}.id = {C}.{KEY} WHERE {P_LABEL} = '{p_name}'
  ORDER BY {C_DAY} DESC LIMIT 1

? How many {children} are there for each {c_category}?
? Break the number of {children} down by {c_category}.
= SELECT {C_CATEGORY}, COUNT(*) FROM {C} GROUP BY {C_CATEGORY}

? What is the {agg} {c_number} per {c_category} of {children} {which}?
? {agg} {c_number} by {c_category}, only {children} {which}.
= SELECT {C_CATEGORY}, {AGG}({C_NUMBER}) FROM {C} WHERE {WHICH} GROUP BY {C_CATEGORY}

? Give the {agg} {c_number} of the {children} of each {parent}.
? For every {parent} with {children}, what is the {agg} {c_number}?
= SELECT {P_LABEL}, {AGG}({C_NUMBER}) FROM {P} JOIN {C} ON {C}.{KEY} = {P}.id GROUP BY {P}.id

? How many {children} does each {parent} have? Show those without any as well.
? Count {children} for all {parents}, zero included.
= SELECT {P_LABEL}, COUNT({C}.id) FROM {P} LEFT JOIN {C} ON {C}.{KEY} = {P}.id GROUP BY {P}.id

? Which {parents} have more than {few} {children}?
? Find every {parent} that has over {few} {children}.
= SELECT {P_LABEL} FROM {P} JOIN {C} ON {C}.{KEY} = {P}.id GROUP BY {P}.id HAVING COUNT(*) > {few}

? For which {p_category} do the {children} reach a {agg} {c_number} above {n}?
? Name each {p_category} of {parents} whose {children} have a {agg} {c_number} over {n}.
= SELECT {P_CATEGORY} FROM {P} JOIN {C} ON {C}.{KEY} = {P}.id GROUP BY {P_CATEGORY}
  HAVING {AGG}({C_NUMBER}) > {n}

? Which {c_category} is the most frequent among {children} {which}?
? The commonest {c_category} of {children} {which}?
= SELECT {C_CATEGORY} FROM {C} WHERE {WHICH} GROUP BY {C_CATEGORY} ORDER BY COUNT(*) DESC LIMIT 1

? Which {parents} have no {child} {which}?
? Find {parents} without {children} {which}.
= SELECT {P_LABEL} FROM {P} WHERE NOT EXISTS (SELECT 1 FROM {C} WHERE {KEY} = {P}.id AND {WHICH})

? Which {parents} have at least one {child} {which}?
? Give the {p_label} of {parents} that own {children} {which}.
= SELECT {P_LABEL} FROM {P} WHERE id IN (SELECT {KEY} FROM {C} WHERE {WHICH})

? Which {children} have {c_number} above the average?
? List {children} that beat the mean {c_number}.
= SELECT {C_LABEL} FROM {C} WHERE {C_NUMBER} > (SELECT AVG({C_NUMBER}) FROM {C})

? Which {parents} have a higher {p_number} than the average {parent}?
? {parents} above the mean {p_number}, please.
= SELECT {P_LABEL}, {P_NUMBER} FROM {P} WHERE {P_NUMBER} > (SELECT AVG({P_NUMBER}) FROM {P})

? For each {c_category}, which {child} has the {agg_end} {c_number}?
? Show the {child} of {agg_end} {c_number} within every {c_category}.
= SELECT {C_CATEGORY}, {C_LABEL} FROM {C} AS c WHERE {C_NUMBER} = (SELECT {AGG_END}({C_NUMBER})
  FROM {C} WHERE {C_CATEGORY} = c.{C_CATEGORY})

? Rank the {children} of each {c_category} by {c_number}.
? Within every {c_category}, number the {children} from the highest {c_number} down, ties alike.
= SELECT {C_LABEL}, RANK() OVER (PARTITION BY {C_CATEGORY} ORDER BY {C_NUMBER} DESC) FROM {C}

? Show the running total of {c_number} over time for {children} {which}.
? Cumulative {c_number} by day, {children} {which} only.
= SELECT {C_DAY}, SUM({C_NUMBER}) OVER (ORDER BY {C_DAY}) FROM {C} WHERE {WHICH}

? By how much did {c_number} change from each {child} to the one {c_day} before it?
? Difference in {c_number} between consecutive {children}, in order of time.
= SELECT {C_LABEL}, {C_NUMBER} - LAG({C_NUMBER}) OVER (ORDER BY {C_DAY}) FROM {C}

? What is the latest {child} of each {KEY}?
? For every {KEY}, the {child} that was {c_day} most recently.
= SELECT {KEY}, {C_LABEL} FROM (SELECT *, ROW_NUMBER() OVER (PARTITION BY {KEY}
  ORDER BY {C_DAY} DESC) AS n FROM {C}) WHERE n = 1

? How many {children} were {c_day} in each year?
? Yearly number of {children}.
= SELECT strftime('%Y', {C_DAY}) AS year, COUNT(*) FROM {C} GROUP BY year

? What was the {agg} {c_number} in each month of {year}?
? {agg} {c_number} per month for {children} {c_day} in {year}.
= SELECT strftime('%m', {C_DAY}) AS month, {AGG}({C_NUMBER}) FROM {C}
  WHERE strftime('%Y', {C_DAY}) = '{year}' GROUP BY month

? How many days before {later} were the {children} {which} {c_day}?
? Age in days, on {later}, of {children} {which}.
= SELECT {C_LABEL}, julianday('{later}') - julianday({C_DAY}) FROM {C} WHERE {WHICH}

? Label each {child} high if its {c_number} is above {n}, else low.
? Sort {children} into high and low {c_number}; the border is {n}.
= SELECT {C_LABEL}, CASE WHEN {C_NUMBER} > {n} THEN 'high' ELSE 'low' END FROM {C}

? How many {children} have {c_number} above {n} and how many do not, per {p_category}?
? Per {p_category} of the {parent}: {children} over {n} in {c_number}, and the rest.
= SELECT {P_CATEGORY}, SUM({C_NUMBER} > {n}), SUM({C_NUMBER} <= {n})
  FROM {P} JOIN {C} ON {C}.{KEY} = {P}.id GROUP BY {P_CATEGORY}

? What share of the {children} does each {c_category} have, in percent?
? Percentage of {children} by {c_category}.
= SELECT {C_CATEGORY}, 100.0 * COUNT(*) / (SELECT COUNT(*) FROM {C}) FROM {C} GROUP BY {C_CATEGORY}

? On average, what do the {children} of a {parent} add up to in {c_number}?
? Mean over {parents} of their summed {c_number}.
= WITH sums AS (SELECT SUM({C_NUMBER}) AS s FROM {C} GROUP BY {KEY}) SELECT AVG(s) FROM sums

? Which {parents} had {children} of {c_category} {value} as well as of {other}?
? {parents} with both {value} and {other} {children}.
= SELECT {P_LABEL} FROM {P} WHERE id IN (SELECT {KEY} FROM {C} WHERE {C_CATEGORY} = '{value}'
  INTERSECT SELECT {KEY} FROM {C} WHERE {C_CATEGORY} = '{other}')

? Which {parent} of {p_category} {p_value} has the largest {p_number}?
? Of all {parents} in {p_category} {p_value}, who leads in {p_number}?
= SELECT {P_LABEL} FROM {P} WHERE {P_CATEGORY} = '{p_value}' ORDER BY {P_NUMBER} DESC LIMIT 1

? Set each {child} against the {agg} {c_number} of its {c_category}.
? {c_label}, {c_number} and the {agg} of its {c_category}, for every {child}.
= SELECT {C_LABEL}, {C_NUMBER}, {AGG}({C_NUMBER}) OVER (PARTITION BY {C_CATEGORY}) FROM {C}
"""
